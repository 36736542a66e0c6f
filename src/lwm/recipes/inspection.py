"""Describe the rows that a recipe's data becomes: decoded text, segments, loss weights."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from lwm.core.errors import InputError
from lwm.data.loader import Loader
from lwm.recipes.assemble import StartingPoint, open_starting_point
from lwm.recipes.settings import TrainingRun

_COUNTED_TOKENS = 50_000
_SHOWN_CHARACTERS = 300


def inspect_rows(run: TrainingRun, rows: int) -> Iterator[str]:
    """Yield lines that describe the first rows, and count the tokens of the first batches."""
    if rows < 1:
        raise InputError(f"rows is {rows}; show at least 1")
    start = open_starting_point(run)
    with Loader(
        run.data, start.tokenizer, sequence_length=run.sequence_length,
        batch_size=run.batch_size, vocab_size=start.config.vocab_size,
        vision=start.config.vision,
    ) as loader:  # fmt: skip
        yield (
            f"{loader.examples:,} examples; rows of {run.sequence_length:,} tokens, "
            f"{run.batch_size} per step, {run.data.packing}"
        )
        if sentence := loader.describe_long_examples():
            yield sentence
        totals, batch = np.zeros(5), {}
        batches = max(1, _COUNTED_TOKENS // (run.batch_size * run.sequence_length))
        for number in range(batches * run.batch_size):
            if (index := number % run.batch_size) == 0:
                batch = next(loader)
            row = {name: x[index] for name, x in batch.items()}
            if number < rows:
                yield from _describe(number, row, start)
            weighted = row["weights"] > 0
            vision = weighted & (row["targets"] >= start.config.vocab_size)
            real, segments = row["segments"] >= 0, len(_segments(row))
            totals += [real.size, real.sum(), weighted.sum(), vision.sum(), segments]
    counts, long = loader.counts, ""
    if counts["too_long"]:
        long = (
            f"{counts['too_long']:,} of {counts['examples']:,} examples longer than a row "
            f"({counts['truncated']:,} truncated), "
        )
    places, tokens, targets, vision, segments = totals
    kinds = f" ({vision:,.0f} of vision)" if start.config.vision else ""
    yield ""
    yield (
        f"in {batches} batches: {places:,.0f} positions, {tokens:,.0f} tokens "
        f"({1 - tokens / places:.1%} padding), {targets:,.0f} of them with loss{kinds}, "
        f"{segments:,.0f} segments; {long}{counts['broken']:,} broken examples"
    )


def _segments(row: dict[str, np.ndarray]) -> list[int]:
    return sorted(set(row["segments"].tolist()) - {-1})


def _describe(number: int, row: dict[str, np.ndarray], start: StartingPoint) -> Iterator[str]:
    padding = int((row["segments"] < 0).sum())
    yield ""
    yield (
        f"row {number}: {len(_segments(row))} segments, {padding:,} positions of padding, "
        f"weight {row['weights'].sum():.3g}"
    )
    for segment in _segments(row):
        here = row["segments"] == segment
        targets, weights, positions = (
            row[name][here] for name in ("targets", "weights", "positions")
        )
        yield (
            f"  segment {segment}: positions {positions.min():,} to {positions.max():,}, "
            f"{(weights > 0).sum():,} of {len(targets):,} targets with loss"
        )
        # The first token of a segment is never a target.
        stretches = groupby(zip(targets, weights, strict=True), key=lambda pair: pair[1] > 0)
        for weighted, pairs in stretches:
            ids = [int(token) for token, _ in pairs]
            text = " ".join(_readable(ids, start))
            yield f"    {'loss   ' if weighted else 'no loss'} {len(ids):>6,}: {text}"


def _readable(ids: list[int], start: StartingPoint) -> Iterator[str]:
    first_vision, vision = start.config.vocab_size, start.config.vision
    for is_vision, run in groupby(ids, key=lambda token: token >= first_vision):
        tokens = list(run)
        if is_vision and vision:
            try:
                frames = len(vision.split(np.array(tokens) - first_vision))
                yield f"<{frames:,} frame{'s' * (frames != 1)} of {vision.codes_per_frame} codes>"
            except InputError:  # a row may cut a video in two
                yield f"<{len(tokens):,} tokens of a cut video>"
        else:
            text = start.tokenizer.backend.decode(tokens, skip_special_tokens=False)
            if len(text) > _SHOWN_CHARACTERS:
                half = _SHOWN_CHARACTERS // 2
                text = f"{text[:half]} ... {text[-half:]}"
            yield repr(text)
