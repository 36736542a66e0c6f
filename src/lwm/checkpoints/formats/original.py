"""The original's checkpoints: `params::`, `trainstate_params::` (streams) and `flax_params::`
(one map).

Layers may be unrolled (`transformer/h/3/...`) or scanned (`transformer/h/scan_decoder/...`, the
layer axis first or second); both are shown to the rest of the room as unrolled. A model that sees
has a second table and a second head, for the ids of vision.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lwm.checkpoints.checkpoint import Checkpoint, forget_pages
from lwm.checkpoints.formats.msgpack import StoredArray, Walker
from lwm.checkpoints.names import ORIGINAL, rows
from lwm.core.config import read_json
from lwm.core.errors import CheckpointError, ConfigError
from lwm.models import sizes
from lwm.models.llama import LlamaConfig
from lwm.models.vision_tokens import VisionVocabulary

KINDS = ("params", "trainstate_params", "flax_params")

_SCANNED = "transformer/h/scan_decoder/"
_VISION_TABLE, _VISION_HEAD = "transformer/vte/embedding", "vision_head/kernel"


class OriginalTensors:
    """Tensors of one file, scanned ones cut into layers."""

    def __init__(self, file: Path, kind: str, config: LlamaConfig, scan_axis: int) -> None:
        source = f"{kind}::{file}"
        try:
            self._data = np.memmap(file, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); check the path") from error
        self._arrays: dict[str, tuple[StoredArray, int | None, int]] = {}
        shapes = {
            row.theirs: row.shape for parts in rows(ORIGINAL, config).values() for row in parts
        }
        walker = Walker(self._data, source)
        for name, value in _entries(walker, kind):
            array = walker.array(value, name)
            if array is None:
                continue
            if not name.startswith(_SCANNED):
                self._arrays[name] = (array, None, 0)
                continue
            rest = name.removeprefix(_SCANNED)
            expected = shapes.get(f"transformer/h/0/{rest}")
            axis = _scan_axis(array.shape, expected, config.num_layers, scan_axis)
            if axis is None:
                raise CheckpointError(
                    f"{source}: the tensor {name!r} has shape {list(array.shape)}, but the "
                    f"configuration asks for {config.num_layers} layers of "
                    f"{list(expected) if expected else 'something else'}; correct --config"
                )
            for layer in range(config.num_layers):
                self._arrays[f"transformer/h/{layer}/{rest}"] = (array, axis, layer)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: array.shape if axis is None else (*array.shape[:axis], *array.shape[axis + 1 :])
            for name, (array, axis, _) in self._arrays.items()
        }

    def stored(self) -> str:
        return "/".join(sorted({str(array.dtype) for array, _, _ in self._arrays.values()}))

    def read(self, name: str) -> np.ndarray:
        forget_pages(self._data)
        array, axis, layer = self._arrays[name]
        return array.view(self._data) if axis is None else array.layer(self._data, axis, layer)


def _entries(walker: Walker, kind: str) -> Iterator[tuple[str, Any]]:
    """Names joined by slashes, and values, of the parameters alone."""
    if kind == "flax_params":
        tree = walker.value()
        while isinstance(tree, dict) and set(tree) == {"params"}:
            tree = tree["params"]
        if not isinstance(tree, dict):
            raise walker.fail("the file holds no map of parameters")
        yield from _flatten(tree, "")
        return
    prefix = ["params", "params"] if kind == "trainstate_params" else []
    found = False
    while walker.offset < walker.end:
        match walker.value():
            case [list(key), value] if all(isinstance(part, str) for part in key):
                pass
            case _:
                raise walker.fail("a pair of a name and an array is needed")
        if key[: len(prefix)] != prefix:
            continue  # the optimizer's state and the like
        # The stream wraps each array in binary data of its own.
        if getattr(value, "code", 0) is None:
            value = Walker(
                walker.data, walker.source, value.start, value.start + value.length
            ).value()
        found = True
        yield "/".join(key[len(prefix) :]), value
    if not found:
        raise CheckpointError(
            f"{walker.source} holds no parameters under {'/'.join(prefix) or 'any name'}; "
            f"try another of the prefixes {', '.join(name + '::' for name in KINDS)}"
        )


def _flatten(tree: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{path}/{key}" if path else key
        if isinstance(value, dict) and "__msgpack_chunked_array__" not in value:
            yield from _flatten(value, name)
        else:
            yield name, value


def _scan_axis(
    shape: tuple[int, ...], expected: tuple[int, ...] | None, layers: int, preferred: int
) -> int | None:
    """Where the layer axis stands: where the configuration says if the shape allows it, else
    wherever it fits."""
    if expected is None:
        return None
    fits = [axis for axis in (0, 1) if shape == (*expected[:axis], layers, *expected[axis:])]
    return preferred if preferred in fits else (fits[0] if fits else None)


def _configuration(config: str | None) -> tuple[LlamaConfig, int]:
    """The model and the scan axis from `--config`: a size's name or a JSON file with the
    original's keys."""
    if config is None:
        raise ConfigError(
            "this checkpoint does not say what it is; add --config with a size "
            f"({', '.join(sizes.NAMES)}) or a JSON file of the original's settings"
        )
    if config in sizes.NAMES:
        return sizes.size(config), 0
    if not Path(config).is_file():
        raise ConfigError(
            f"--config {config!r} is neither a size ({', '.join(sizes.NAMES)}) nor a file; "
            "correct it"
        )
    data = read_json(Path(config))
    names = {
        "vocab_size": (int, "vocab_size"),
        "hidden_size": (int, "hidden_size"),
        "intermediate_size": (int, "intermediate_size"),
        "num_layers": (int, "num_hidden_layers"),
        "num_heads": (int, "num_attention_heads"),
        "max_sequence_length": (int, "max_sequence_length"),
        "rms_norm_eps": (float, "rms_norm_eps"),
        "rope_theta": (float, "theta"),
        "initializer_range": (float, "initializer_range"),
    }
    aliases = {"rope_theta": "theta", "max_position_embeddings": "max_sequence_length"}
    data = {aliases.get(key, key): value for key, value in data.items()}
    values: dict[str, Any] = {}
    if "size" in data:
        base = sizes.size(str(data["size"]))
        values = {ours: getattr(base, ours) for ours in names}
    for ours, (kind, theirs) in names.items():
        if theirs in data:
            values[ours] = _number(data[theirs], kind, f"{config}: {theirs}")
    if data.get("tie_word_embeddings"):
        values["tie_embeddings"] = True
    scan_axis = 1 if data.get("param_scan_axis") == 1 else 0
    for needed in ("hidden_size", "num_heads", "num_layers", "intermediate_size", "vocab_size"):
        if needed not in values:
            raise ConfigError(f"{config}: the key {names[needed][1]!r} is missing; add it")
    heads = values["num_heads"]
    if data.get("num_key_value_heads", heads) != heads:
        raise ConfigError(
            f"{config}: num_key_value_heads is {data['num_key_value_heads']} and the original has "
            f"one for each of its {heads} heads; correct the file"
        )
    if heads < 1 or values["hidden_size"] % heads:
        raise ConfigError(
            f"{config}: hidden_size ({values['hidden_size']}) must be a multiple of "
            f"num_attention_heads ({heads})"
        )
    values.setdefault("max_sequence_length", 2048)
    values |= {"num_kv_heads": heads, "head_dim": values["hidden_size"] // heads}
    return LlamaConfig(**values, vision=_vision(data, config)), scan_axis


def _vision(data: dict[str, Any], source: str) -> VisionVocabulary | None:
    """The ids of vision, if the settings have some.

    The original's code holds 8192 codes and 256 a frame as constants, and 256 rows above the codes
    in its table. Tables of another size are taken to be made in the same way if they are large
    enough, and else to hold codes and the two end tokens alone; two keys of our own say otherwise.
    """
    keys = {"size": "vision_vocab_size", "codes": "vision_codes",
            "codes_per_frame": "vision_codes_per_frame"}  # fmt: skip
    values = {
        ours: _number(data[theirs], int, f"{source}: {theirs}")
        for ours, theirs in keys.items()
        if theirs in data
    }
    if "size" not in values:
        return None
    size = values["size"]
    values.setdefault("codes", size - 256 if size > 256 else size - 2)
    return VisionVocabulary(**values)


def _number(value: Any, kind: type, what: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | kind):
        raise ConfigError(f"{what} is {value!r}; a number ({kind.__name__}) is needed")
    try:
        return kind(value)
    except OverflowError as error:
        raise ConfigError(f"{what} is too large; correct it") from error


def _require_same_sight(
    shapes: dict[str, tuple[int, ...]], config: LlamaConfig, source: str
) -> None:
    """Refuses settings of a text model for a file of one that sees, and the reverse."""
    found = next((name for name in (_VISION_TABLE, _VISION_HEAD) if name in shapes), None)
    if found is not None and config.vision is None:
        size = shapes[found][0 if found == _VISION_TABLE else -1] if shapes[found] else 0
        raise CheckpointError(
            f"{source} is a vision-language checkpoint (it has {found!r}) and --config has no "
            f'vision_vocab_size; add "vision_vocab_size": {size} to the JSON file of settings, or '
            'write one with it and "size": "7b" or the like'
        )
    if found is None and config.vision is not None:
        raise CheckpointError(
            f"{source} is a text checkpoint (it has no {_VISION_TABLE!r}) and --config says "
            f"vision_vocab_size = {config.vision.size}; leave that key out"
        )


def open_original(kind: str, file: Path, config: str | None) -> Checkpoint:
    """A checkpoint of the original, of a text model or one that sees.

    Args:
        config: a size's name, or a JSON file with the original's keys.

    Raises:
        CheckpointError: the file is missing, broken, or not of this kind.
        ConfigError: the settings are missing or wrong.
    """
    if not file.is_file():
        raise CheckpointError(f"{kind}::{file}: there is no such file; check the path")
    model, scan_axis = _configuration(config)
    tensors = OriginalTensors(file, kind, model, scan_axis)
    _require_same_sight(tensors.shapes(), model, f"{kind}::{file}")
    return Checkpoint(
        source=f"{kind}::{file}",
        format=f"original ({kind})",
        stored=tensors.stored(),
        config=model,
        table=ORIGINAL,
        tensors=tensors,
    )
