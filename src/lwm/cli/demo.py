"""Demonstrate a small real model on a real book, with timings: `lwm demo`."""

import os
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

from lwm.cli.flags import print_stream

if TYPE_CHECKING:
    from lwm.generation.text_generation import Timings

MODEL, BOOK = "smollm2", "Ruth"
RING = "1,1,1,4"
NEEDLE = "The special magic Paris number is: 7421936."
NEEDLE_QUESTION = "What is the special magic Paris number?"
show = partial(print, flush=True)
NEXT = """\
Next:
  lwm chat smollm2                                talk; --document FILE to talk about a document
  lwm generate text smollm2 --prompt "Once upon"  continue a text
  lwm info --list                                 models that have names
  lwm convert smollm2 DIR --format huggingface    the same model for transformers"""


def demo() -> None:
    """Take a tour: a small model answers questions about a book."""
    # The ring runs on four simulated devices, which must be configured before jax starts.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
    from lwm.data.text.documents import read_text

    started = time.perf_counter()
    passage = read_text(f"book:{BOOK}")
    middle = passage.index(". ", len(passage) // 2) + 2
    planted = f"{passage[:middle]}{NEEDLE} {passage[middle:]}"

    single = _Tour(None)
    show("\n1. A plain question")
    single.ask("What is the capital of France?", expected="Paris")
    size = len(single.model.tokenizer.encode(passage))
    show(f"\n2. Questions about a passage: the Book of {BOOK}, King James Bible, {size:,} tokens")
    single.ask("What is the name of Naomi's husband?", expected="Elimelech", about=passage)
    single.ask("Which city did they come to?", expected="Bethlehem", about=passage)
    show("\n3. A needle planted in the middle of the passage")
    answer = single.ask(NEEDLE_QUESTION, expected="7421936", about=planted)
    del single.model  # frees its weights before the ring loads its own

    show(f"\n4. The same passage read over a ring of four simulated devices (--mesh {RING})")
    ring = _Tour(RING)
    same = ring.ask(NEEDLE_QUESTION, expected="7421936", about=planted) == answer
    print(f"      {'the same answer' if same else 'ANOTHER ANSWER'} as on one device")

    show("\n5. Speed, compiling included where a step ran for the first time")
    print(f"   one device    {single.speed()}")
    print(f"   ring of four  {ring.speed()}; simulated: the four share this machine's cores")
    print(f"\nDone in {time.perf_counter() - started:.0f} seconds.\n\n{NEXT}")
    if not (single.right and ring.right and same):
        print("lwm: the demo went wrong: see the answers marked above", file=sys.stderr)
        sys.exit(1)


class _Tour:
    """Ask one model, print the answers, and compare each with what it must contain."""

    def __init__(self, mesh: str | None) -> None:
        from lwm.generation.load import load

        self.model = load(MODEL, mesh=mesh)
        self.right = True
        self._timings: list[Timings] = []

    def ask(self, question: str, *, expected: str, about: str | None = None) -> str:
        content = question if about is None else f"{about}\n\n{question}"
        show(f"   Q: {question}\n   A: ", end="")
        message = [{"role": "user", "content": content}]
        answer = print_stream(self.model.chat(message, max_tokens=24, stream=True))
        right = expected in answer
        self.right &= right
        self._timings.append(self.model.timings)
        verdict = "right" if right else f"WRONG, it should say {expected}"
        show(f"      {verdict}; {self.model.timings}")
        return answer

    def speed(self) -> str:
        read = sum(timings.prompt - timings.reused for timings in self._timings)
        reading = sum(timings.prefill_seconds for timings in self._timings)
        written = sum(timings.answer - 1 for timings in self._timings)
        writing = sum(timings.answer_seconds for timings in self._timings)
        return f"reads {read / reading:,.0f} tokens/s, writes {written / writing:,.1f} tokens/s"
