"""Compare needle cells per minute with Hugging Face transformers' `generate`.

Both sides run SmolLM2-135M from the same GGUF file on the same token ids, with greedy decoding and
the same limit on the length of answers. They run alternately in separate processes, and warm up on
an equal number of other cells. Both answer one prompt at a time; `lwm` reuses the prefix that a
prompt shares with the previous one, as `lwm eval needle` does. The benchmark prints the ratio of
medians and the number of cells in which both sides give the same answer.

usage: python benchmarks/needle.py [--rounds 3] [--lengths 1024,2048] [--depths 0:100:4]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lwm
from lwm.checkpoints.open import KNOWN_MODELS
from lwm.cli.ranges import parse_depths, parse_lengths
from lwm.evaluation.answering import ModelAnswerer
from lwm.evaluation.task import Case
from lwm.evaluation.tasks.haystack import SPREAD, read_haystack
from lwm.evaluation.tasks.needle import NeedleTask

MAX_TOKENS = 32


def make_units(lengths: str, depths: str) -> list[list[list[int]]]:
    """Make the prompts of `lwm eval needle` by length and round; the first round warms up."""
    from lwm.checkpoints.open import open_checkpoint
    from lwm.generation.load import open_tokenizer

    tokenizer = open_tokenizer(open_checkpoint("smollm2"), None)
    assert tokenizer is not None
    wanted = parse_lengths(lengths)
    task = NeedleTask(
        tokenizer=tokenizer,
        haystack=read_haystack("book", tokenizer, SPREAD * wanted[-1]),
        lengths=wanted,
        depths=parse_depths(depths),
        rounds=2,
    )
    return [[list(task.case(key).prompt) for key in unit] for unit in task.units()]


def ours(units: Sequence[Sequence[Sequence[int]]]) -> tuple[float, list[str]]:
    model = lwm.load("smollm2")
    answerer = ModelAnswerer(model)

    def ask(prompts: Sequence[Sequence[int]]) -> list[str]:
        answerer.restart()
        cases = [
            Case(prompt=prompt, target=[0], max_tokens=MAX_TOKENS, reference="")
            for prompt in prompts
        ]
        return list(answerer.answer(cases))

    for unit in units[::2]:
        ask(unit)
    start = time.perf_counter()
    answers = [answer for unit in units[1::2] for answer in ask(unit)]
    return time.perf_counter() - start, answers


def transformers(units: Sequence[Sequence[Sequence[int]]]) -> tuple[float, list[str]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = KNOWN_MODELS["smollm2"].installed()
    assert file is not None
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()

    def ask(prompt: Sequence[int]) -> str:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS,
                do_sample=False, temperature=None, top_p=None, top_k=None,
                pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        return tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)

    for unit in units[::2]:
        for prompt in unit:
            ask(prompt)
    start = time.perf_counter()
    answers = [ask(prompt) for unit in units[1::2] for prompt in unit]
    return time.perf_counter() - start, answers


SIDES = {"lwm": ours, "transformers": transformers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=SIDES, help="run only this side, and print JSON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", default="1024,2048")
    parser.add_argument("--depths", default="0:100:4")
    arguments = parser.parse_args()
    units = make_units(arguments.lengths, arguments.depths)
    cells = sum(map(len, units[1::2]))
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](units)))
        return
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    said: dict[str, list[str]] = {}
    for _ in range(arguments.rounds):
        for side, cells_per_minute in rates.items():
            command = [sys.executable, str(Path(__file__)), "--side", side]
            command += ["--lengths", arguments.lengths, "--depths", arguments.depths]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, said[side] = json.loads(done.stdout.splitlines()[-1])
            cells_per_minute.append(60 * cells / seconds)
            print(f"{side}: {cells_per_minute[-1]:.1f} cells a minute", file=sys.stderr)
    pairs = [one / other for one, other in zip(*rates.values(), strict=True)]
    mine, theirs = (statistics.median(values) for values in rates.values())
    same = sum(one.strip() == other.strip() for one, other in zip(*said.values(), strict=True))
    print(f"{cells} cells of {arguments.lengths} tokens, depths {arguments.depths}")
    print(f"lwm {mine:.1f} cells a minute, transformers {theirs:.1f}: ratio {mine / theirs:.2f} "
          f"(rounds {min(pairs):.2f} to {max(pairs):.2f})")  # fmt: skip
    print(f"the same answer in {same} of {cells} cells")


if __name__ == "__main__":
    main()
