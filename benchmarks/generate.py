"""Compare inference with Hugging Face transformers: SmolLM2-135M from the same GGUF file.

The two sides run alternately in separate processes for several rounds. The benchmark prints ratios
of medians, with the lowest and highest ratio of a single round, because machines are noisy.
Prefill is measured by the time to the first token of a 2,048-token prompt; memory is the peak of
the whole process, including loading. Decode counts the tokens after the first: `decode, plain`
generates one token per step, as transformers does, and `decode` uses drafts looked up in the text,
the engine's default. The gain from drafts depends on how repetitive an answer is, so it is
measured on a short answer and on a long one.

usage: python benchmarks/generate.py [--rounds 3] [--prefill 2048] [--decode 48] [--long 256]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from lwm.checkpoints.open import KNOWN_MODELS
from lwm.data.text.documents import read_text


def peak() -> float:
    """Return the peak memory of this process, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def ours(prefill: int, short: int, long: int) -> dict[str, float]:
    import lwm
    from lwm.engine.engine import Engine
    from lwm.engine.request import Request
    from lwm.engine.sampling import Sampling

    model = lwm.load("smollm2")
    tokens = model.tokenizer.encode(read_text("book")[: prefill * 8])[: prefill + 1]
    greedy = Sampling(temperature=0.0)

    def run(engine: Engine, prompt: list[int], count: int) -> tuple[float, list[float]]:
        start = time.perf_counter()
        request = Request(prompt=prompt, max_tokens=count, sampling=greedy)
        times = [time.perf_counter() for _ in engine.stream(request)]
        return times[0] - start, [moment - times[0] for moment in times]

    figures = {}
    for kind, drafts in (("", True), (", plain", False)):
        engine = Engine(model.weights, model.config, tokens=prefill + long + 1, drafts=drafts)
        # Compile every step, on texts that share no prefix with the measured one; the second is
        # repetitive, so that drafts are right.
        run(engine, tokens[1 : prefill + 1], 2)
        run(engine, tokens[5:9] * 10, 24)
        reading, times = run(engine, tokens[:prefill], long + 1)
        if drafts:
            figures |= {"prefill": prefill / reading, "memory": peak()}
        figures[f"decode {short}{kind}"] = short / times[short]
        figures[f"decode {long}{kind}"] = long / times[long]
    return figures


def transformers(prefill: int, short: int, long: int) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = KNOWN_MODELS["smollm2"].installed()
    assert file is not None
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    ids = tokenizer(read_text("book")[: prefill * 8], return_tensors="pt").input_ids
    ids = ids[:, :prefill]
    assert ids.shape[1] == prefill, ids.shape
    with torch.inference_mode():
        model(ids[:, :64], use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        output = model(ids, use_cache=True, logits_to_keep=1)
        reading = time.perf_counter() - start
        start, times = time.perf_counter(), [0.0]
        for _ in range(long):
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
            times.append(time.perf_counter() - start)
    figures = {"prefill": prefill / reading, "memory": peak()}
    for kind in ("", ", plain"):
        figures[f"decode {short}{kind}"] = short / times[short]
        figures[f"decode {long}{kind}"] = long / times[long]
    return figures


SIDES = {"lwm": ours, "transformers": transformers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=SIDES, help="run only this side, and print JSON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--decode", type=int, default=48, help="tokens in the short answer")
    parser.add_argument("--long", type=int, default=256, help="tokens in the long answer")
    arguments = parser.parse_args()
    sizes = (arguments.prefill, arguments.decode, max(arguments.decode, arguments.long))
    if arguments.side:
        figures = SIDES[arguments.side](*sizes)
        print(json.dumps(figures))
        return
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(arguments.rounds):
        for side, results in rounds.items():
            command = [sys.executable, str(Path(__file__)), "--side", side]
            command += ["--prefill", str(sizes[0]), "--decode", str(sizes[1])]
            command += ["--long", str(sizes[2])]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1} {side}: {results[-1]}", file=sys.stderr)
    print(f"{'':28}{'lwm':>8}{'transformers':>14}{'ratio':>7}   rounds")
    for name in rounds["lwm"][0]:
        unit = "GB" if name == "memory" else "tokens/s"
        mine, theirs = (statistics.median(one[name] for one in rounds[side]) for side in SIDES)
        pairs = [
            one[name] / other[name]
            for one, other in zip(rounds["lwm"], rounds["transformers"], strict=True)
        ]
        print(
            f"{f'{name} ({unit})':28}{mine:>8.2f}{theirs:>14.2f}{mine / theirs:>7.2f}"
            f"   {min(pairs):.2f} to {max(pairs):.2f}"
        )


if __name__ == "__main__":
    main()
