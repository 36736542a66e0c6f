"""Count the examples that are longer than a row, before any of them is trained on."""

from collections.abc import Sequence
from itertools import islice

from lwm.data.examples.examples import Broken, Example, TooLong
from lwm.data.rows.draws import Split

_SAMPLED_EXAMPLES = 500  # of each data set, in the order of its first pass
_SAMPLED_TOKENS = 1 << 20


def describe_long_examples(opened: Sequence[tuple[Split, Example]], length: int) -> str | None:
    """Return a sentence on the examples that do not fit into a row, or that rows cut in two.

    Plain texts go on in the next row and are not counted. Large data is sampled.

    Args:
        opened: the data sets, with the first usable example of each.
        length: of a row, in (input, target) pairs.
    """
    splits = [split for split, first in opened if not first.plain]
    if not splits:
        return None
    read = truncated = skipped = cut = 0
    for split in splits:
        tokens = 0
        for place in islice(range(split.order.count), _SAMPLED_EXAMPLES):
            try:
                example = split.example(split.order[place])
            except Broken:
                continue
            except TooLong:
                skipped += 1
                tokens += length  # at least
            else:
                if example is None:
                    continue
                truncated += example.truncated
                cut += not example.plain and len(example) > length + 1
                tokens += len(example)
            read += 1
            if tokens > _SAMPLED_TOKENS:
                break
    sampled = "" if read == sum(split.order.count for split in splits) else "sampled "
    count = truncated + skipped + cut
    longer = f"{count:,} of {read:,} {sampled}examples are longer than a row of {length:,} tokens"
    if splits[0].longest is None:
        return (
            "--data.packing concatenate cuts examples where a row ends, also between a question "
            f"and its answer, and {longer}; --data.packing pack keeps each in one row"
        )
    if not count:
        return None
    if truncated and skipped:
        outcome = f": {truncated:,} are truncated, {skipped:,} are skipped"
    else:
        outcome = " and are truncated" if truncated else " and are skipped"
    return f"{longer}{outcome}; raise --sequence-length, or choose by --data.too-long"
