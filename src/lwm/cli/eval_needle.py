"""`lwm eval needle` and `lwm eval multi-needle`: what a model finds in a long text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lwm.cli.eval_run import answered, report
from lwm.cli.flags import ModelName, SharedLoad, SharedLoadFlags
from lwm.core.distributed import first_process

_WORDS = 1024
"""Tokens of question and template beyond the longest length, where the context can be chosen."""


@dataclass(frozen=True, kw_only=True)
class NeedleFlags:
    """Where needles are hidden and how finding them is judged."""

    haystack: str = "book"
    """Text they are hidden in: book (the King James Bible), a txt, md, html or pdf file, JSON
    lines or Parquet with a field text."""
    lengths: str = "1024:8192:4"
    """Context lengths in tokens: 1024,8192 or min:max:count."""
    depths: str = "0:100:5"
    """Per cent of the text before a needle: 0,50,100 or min:max:count."""
    depth_spacing: Literal["linear", "sigmoid"] = "linear"
    """Whether a range of depths is even or closer towards both ends."""
    rounds: int = 1
    """Questions for each length and depth; for each length where several needles are hidden."""
    seed: int = 0
    """Of the first round; the following count on."""
    score: Literal["generation", "logits"] = "generation"
    """Judge what the model writes, or whether each digit is the likeliest behind those before."""
    template: str = "auto"
    """How turns are written: auto (the model's own), original, chatml, or none."""
    max_tokens: int = 64
    """Longest answer."""
    batch_tokens: int = 0
    """Tokens of the prompts that are asked together; by default one prompt at a time, so that
    what a prompt shares with the one before is read once."""
    theta: float | None = None
    """Another base of the rotary positions; the context is then as long as the longest length."""
    out: Path | None = None
    """Directory for results, picture and report; runs/eval/NAME-MODEL unless given. A run that was
    interrupted goes on."""


Needle = Annotated[NeedleFlags, tyro.conf.OmitArgPrefixes]


def needle(
    model: ModelName, /, flags: Needle = NeedleFlags(), load: SharedLoad = SharedLoadFlags()
) -> None:
    """Find a number hidden in a long text, by length and depth."""
    with load.joined():
        _evaluate(model, flags, load, needles=None, retrieved=1)


def multi_needle(
    model: ModelName,
    /,
    needles: int = 4,
    retrieve: int = 2,
    flags: Needle = NeedleFlags(),
    load: SharedLoad = SharedLoadFlags(),
) -> None:
    """Find some of several numbers hidden in a long text, by length.

    Args:
        needles: Numbers hidden.
        retrieve: Numbers asked for.
    """
    with load.joined():
        _evaluate(model, flags, load, needles=needles, retrieved=retrieve)


def _evaluate(
    name: str, flags: NeedleFlags, load: SharedLoadFlags, *, needles: int | None, retrieved: int
) -> None:
    from lwm.cli.ranges import parse_depths, parse_lengths
    from lwm.evaluation.tasks.haystack import SPREAD, read_haystack
    from lwm.evaluation.tasks.needle import NeedleTask
    from lwm.generation.session import model_fingerprint

    lengths = parse_lengths(flags.lengths)
    depths = parse_depths(flags.depths, flags.depth_spacing)
    kind = "needle" if needles is None else "multi-needle"
    room = 0 if flags.theta is None else _WORDS + flags.max_tokens
    model = load.load(name, theta=flags.theta, length=lengths[-1] + room)
    haystack = read_haystack(flags.haystack, model.tokenizer, SPREAD * lengths[-1])
    task = NeedleTask(
        tokenizer=model.tokenizer,
        haystack=haystack,
        lengths=lengths,
        depths=depths,
        rounds=flags.rounds,
        seed=flags.seed,
        needles=needles,
        retrieved=retrieved,
        template=flags.template,
        max_tokens=flags.max_tokens,
        by_logits=flags.score == "logits",
    )
    task.require_context(model.config.max_sequence_length)
    settings: dict[str, Any] = {
        "evaluation": kind, "model": name, "theta": flags.theta, "dtype": model.dtype,
        "haystack": flags.haystack, "lengths": lengths, "depths": depths, "rounds": flags.rounds,
        "seed": flags.seed, "score": flags.score, "template": flags.template,
        "max_tokens": flags.max_tokens, "weights": model_fingerprint(model),
        "text": haystack.fingerprint,
    }  # fmt: skip
    if needles is not None:
        settings |= {"needles": needles, "retrieved": retrieved}
    out = flags.out or Path("runs", "eval", f"{kind}-{Path(name).name}")
    rows = answered(
        task, model, out, settings, score=flags.score, batch_tokens=flags.batch_tokens,
        template=flags.template,
        place=lambda row: f"{row['context_length']:,} tokens, depth {row['depth_percent']}",
    )  # fmt: skip
    if first_process():
        report(task, out, settings, rows)
