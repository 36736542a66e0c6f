"""Inference beside Hugging Face transformers: SmolLM2-135M from the same GGUF file, the same text,
in the same minutes.

Both sides run in processes of their own, in turn, several rounds; ratios are of medians, because
machines are noisy. Prefill is the time to the first token of a 2,048-token prompt, decode the
tokens after it, memory the peak of the whole process, loading included.

usage: python benchmarks/generate.py [--rounds 3] [--prefill 2048] [--decode 48]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from lwm.checkpoints.known import find_known
from lwm.data.books import king_james_bible


def ours(prefill: int, decode: int) -> dict[str, float]:
    import lwm
    from lwm.inference.engine import Engine, Request
    from lwm.inference.sampling import Sampling

    model = lwm.load("smollm2")
    tokens = model.tokenizer.encode(king_james_bible()[: prefill * 8])[: prefill + 1]
    engine = Engine(model.weights, model.config, tokens=prefill + decode + 1)
    greedy = Sampling(temperature=0.0)

    def run(prompt: list[int], count: int) -> tuple[float, float]:
        start = time.perf_counter()
        events = engine.stream(Request(prompt=prompt, max_tokens=count, sampling=greedy))
        next(events)
        first = time.perf_counter()
        for _ in events:
            pass
        return first - start, time.perf_counter() - first

    # Compiles every step, on a text that shares no beginning with the one that counts.
    run(tokens[1 : prefill + 1], 2)
    reading, writing = run(tokens[:prefill], decode + 1)
    return {"prefill": prefill / reading, "decode": decode / writing}


def transformers(prefill: int, decode: int) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = find_known("smollm2")
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    ids = tokenizer(king_james_bible()[: prefill * 8], return_tensors="pt").input_ids
    ids = ids[:, :prefill]
    assert ids.shape[1] == prefill, ids.shape
    with torch.inference_mode():
        model(ids[:, :64], use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        output = model(ids, use_cache=True, logits_to_keep=1)
        reading = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(decode):
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
        writing = time.perf_counter() - start
    return {"prefill": prefill / reading, "decode": decode / writing}


SIDES = {"lwm": ours, "transformers": transformers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=SIDES, help="run one side only, and print JSON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--decode", type=int, default=48)
    arguments = parser.parse_args()
    if arguments.side:
        figures = SIDES[arguments.side](arguments.prefill, arguments.decode)
        figures["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps(figures))
        return
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(arguments.rounds):
        for side, seen in rounds.items():
            command = [sys.executable, str(Path(__file__)), "--side", side]
            command += ["--prefill", str(arguments.prefill), "--decode", str(arguments.decode)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seen.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1} {side}: {seen[-1]}", file=sys.stderr)
    print(f"{'':22}{'lwm':>10}{'transformers':>14}{'ratio':>8}")
    for name, unit in (("prefill", "tokens/s"), ("decode", "tokens/s"), ("memory", "GB")):
        mine, theirs = (statistics.median(seen[name] for seen in rounds[side]) for side in SIDES)
        print(f"{f'{name} ({unit})':22}{mine:>10.2f}{theirs:>14.2f}{mine / theirs:>8.2f}")


if __name__ == "__main__":
    main()
