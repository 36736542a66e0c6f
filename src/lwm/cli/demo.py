"""`lwm demo`: the tour on the embedded default, a small real model and a real book, with
figures."""

import os
import sys
import time
from typing import TYPE_CHECKING

from lwm.cli.flags import print_stream

if TYPE_CHECKING:
    from lwm.generation.timings import Timings

MODEL, BOOK = "smollm2", "Ruth"
RING = "1,1,1,4"
NEEDLE = "The special magic Paris number is: 7421936."
NEEDLE_QUESTION = "What is the special magic Paris number?"
NEXT = """\
Next:
  lwm chat smollm2                                talk; --document FILE to talk about a document
  lwm generate text smollm2 --prompt "Once upon"  continue a text
  lwm info --list                                 models that have names
  lwm convert smollm2 DIR --format huggingface    the same model for transformers"""


def demo() -> None:
    """The tour: a real model answers questions about a real book, also over a ring of devices."""
    # The ring runs on four simulated devices; they must be asked for before jax starts.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
    from lwm.data.text.books import king_james_bible

    started = time.perf_counter()
    passage = king_james_bible(BOOK)
    middle = passage.index(". ", len(passage) // 2) + 2
    planted = f"{passage[:middle]}{NEEDLE} {passage[middle:]}"

    alone = _Tour(None)
    _title("1. A plain question")
    alone.ask("What is the capital of France?", expected="Paris")
    size = len(alone.model.tokenizer.encode(passage))
    _title(f"2. Questions about a passage: the Book of {BOOK}, King James Bible, {size:,} tokens")
    alone.ask("What is the name of Naomi's husband?", expected="Elimelech", about=passage)
    alone.ask("Which city did they come to?", expected="Bethlehem", about=passage)
    _title("3. A needle planted in the middle of the passage")
    found = alone.ask(NEEDLE_QUESTION, expected="7421936", about=planted)
    del alone.model  # its weights need not stand beside those of the ring

    _title(f"4. The same passage read over a ring of four simulated devices (--mesh {RING})")
    ring = _Tour(RING)
    again = ring.ask(NEEDLE_QUESTION, expected="7421936", about=planted)
    print(f"      {'the same answer' if again == found else 'ANOTHER ANSWER'} as on one device")

    _title("5. Speed, compiling included where a step ran for the first time")
    print(f"   one device    {alone.speed()}")
    print(f"   ring of four  {ring.speed()}; simulated: the four share this machine's cores")
    print(f"\nDone in {time.perf_counter() - started:.0f} seconds.\n\n{NEXT}")
    if not (alone.right and ring.right and again == found):
        print("lwm: the demo went wrong: see the answers marked above", file=sys.stderr)
        sys.exit(1)


def _title(text: str) -> None:
    print(f"\n{text}", flush=True)


class _Tour:
    """Asks one model, shows the answers, and compares each with what must be in it."""

    def __init__(self, mesh: str | None) -> None:
        from lwm.generation.load import load

        self.model = load(MODEL, mesh=mesh)
        self.right = True
        self._seen: list[Timings] = []

    def ask(self, question: str, *, expected: str, about: str | None = None) -> str:
        content = question if about is None else f"{about}\n\n{question}"
        print(f"   Q: {question}\n   A: ", end="", flush=True)
        message = [{"role": "user", "content": content}]
        answer = print_stream(self.model.chat(message, max_tokens=24, stream=True))
        good = expected in answer
        self.right &= good
        self._seen.append(self.model.timings)
        verdict = "right" if good else f"WRONG, it should say {expected}"
        print(f"      {verdict}; {self.model.timings}", flush=True)
        return answer

    def speed(self) -> str:
        read = sum(seen.prompt - seen.reused for seen in self._seen)
        reading = sum(seen.prefill_seconds for seen in self._seen)
        written = sum(seen.answer - 1 for seen in self._seen)
        writing = sum(seen.answer_seconds for seen in self._seen)
        return f"reads {read / reading:,.0f} tokens/s, writes {written / writing:,.1f} tokens/s"
