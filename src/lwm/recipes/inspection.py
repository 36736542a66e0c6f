"""What a recipe's data looks like once it is rows: decoded, cut into segments, with what carries
loss.

For people who want to see their data before a run learns from it.
"""

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from lwm.core.errors import InputError
from lwm.data.loader import Loader
from lwm.models.llama import LlamaConfig
from lwm.recipes.assemble import StartingPoint, open_starting_point
from lwm.recipes.settings import TrainingRun

_COUNTED = 50_000  # tokens that are counted, at least those of one batch
_SHOWN = 300  # characters of a stretch of text


def inspect_rows(run: TrainingRun, rows: int) -> Iterator[str]:
    """Lines that describe the first rows and count the tokens of the first batches.

    Raises:
        ConfigError, InputError: as when the run starts.
    """
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
            f"{run.batch_size} a step, {run.data.packing}"
        )
        totals = np.zeros(5)
        shown = 0
        batches = max(1, _COUNTED // (run.batch_size * run.sequence_length))
        for _ in range(batches):
            batch = next(loader)
            for number in range(len(batch["tokens"])):
                row = {name: x[number] for name, x in batch.items()}
                if shown < rows:
                    yield from _describe(shown, row, start)
                    shown += 1
                real, learnt = row["segments"] >= 0, row["weights"] > 0
                seen = learnt & (row["targets"] >= start.config.vocab_size)
                totals += [real.size, real.sum(), learnt.sum(), seen.sum(), _segments(row)]
        places, tokens, targets, vision, segments = totals
        kinds = f" ({vision:,.0f} of vision)" if start.config.vision else ""
        yield ""
        yield (
            f"in {batches} batches: {places:,.0f} places, {tokens:,.0f} tokens "
            f"({1 - tokens / places:.1%} padding), {targets:,.0f} of them learnt{kinds}, "
            f"{segments:,.0f} segments; {loader.broken} broken examples"
        )


def _segments(row: dict[str, np.ndarray]) -> int:
    return len(set(row["segments"][row["segments"] >= 0].tolist()))


def _describe(number: int, row: dict[str, np.ndarray], start: StartingPoint) -> Iterator[str]:
    padding = int((row["segments"] < 0).sum())
    yield ""
    yield (
        f"row {number}: {_segments(row)} segments, {padding:,} places of padding, "
        f"weight {row['weights'].sum():.3g}"
    )
    for segment in sorted(set(row["segments"].tolist()) - {-1}):
        here = row["segments"] == segment
        targets, weights = row["targets"][here], row["weights"][here]
        positions = row["positions"][here]
        yield (
            f"  segment {segment}: positions {positions.min():,} to {positions.max():,}, "
            f"{(weights > 0).sum():,} of {len(targets):,} targets learnt"
        )
        # The first token of a segment is read and never a target.
        stretches = groupby(zip(targets, weights, strict=True), key=lambda pair: pair[1] > 0)
        for learnt, pairs in stretches:
            ids = [int(token) for token, _ in pairs]
            text = " ".join(_readable(ids, start))
            yield f"    {'learnt ' if learnt else 'no loss'} {len(ids):>6,}: {text}"


def _readable(ids: list[int], start: StartingPoint) -> Iterator[str]:
    """Text as it is, vision as what it holds."""
    border = start.config.vocab_size
    for vision, run in groupby(ids, key=lambda token: token >= border):
        tokens = list(run)
        if vision:
            yield _frames([token - border for token in tokens], start.config)
            continue
        text = start.tokenizer.backend.decode(tokens, skip_special_tokens=False)
        if len(text) > _SHOWN:
            text = f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
        yield repr(text)


def _frames(tokens: list[int], config: LlamaConfig) -> str:
    """`<3 frames of 256 codes>`; a row may also cut a video in two."""
    vision = config.vision
    assert vision is not None
    try:
        frames = len(vision.split(np.array(tokens)))
    except InputError:
        return f"<{len(tokens):,} tokens of a cut video>"
    return f"<{frames:,} frame{'s' * (frames != 1)} of {vision.codes_per_frame} codes>"
