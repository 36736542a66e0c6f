"""Open the original's checkpoints: `params::` and `trainstate_params::` (streams of arrays) and
`flax_params::` (one map).

Layers may be separate (`transformer/h/3/...`) or stacked (`transformer/h/scan_decoder/...`, with
the layer axis first or second); both are provided as separate. A vision-language model has a
second table and a second head, for the vision ids.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lwm.checkpoints.checkpoint import Checkpoint, release_pages
from lwm.checkpoints.formats.huggingface import config_from_keys, config_to_keys
from lwm.checkpoints.formats.msgpack import CHUNKED, Region, StoredArray, Walker
from lwm.checkpoints.names import AS_IS, NameRow, NameTable, stored_tensors
from lwm.core.config import read_json
from lwm.core.errors import CheckpointError, ConfigError
from lwm.models import sizes
from lwm.models.llama import LlamaConfig
from lwm.models.vision_tokens import VisionVocabulary

KINDS = ("params", "trainstate_params", "flax_params")

_LAYER = "transformer/h/{layer}"
_STACKED = "transformer/h/scan_decoder/"
_VISION_TABLE, _VISION_HEAD = "transformer/vte/embedding", "vision_head/kernel"

ORIGINAL_NAMES: NameTable = (
    NameRow("embedding", "transformer/wte/embedding", AS_IS, "text"),
    NameRow("embedding", _VISION_TABLE, AS_IS, "vision"),
    NameRow("layers.{layer}.attention_norm", f"{_LAYER}/attention_norm/kernel", AS_IS),
    NameRow("layers.{layer}.query", f"{_LAYER}/attention/wq/kernel", AS_IS),
    NameRow("layers.{layer}.key", f"{_LAYER}/attention/wk/kernel", AS_IS),
    NameRow("layers.{layer}.value", f"{_LAYER}/attention/wv/kernel", AS_IS),
    NameRow("layers.{layer}.output", f"{_LAYER}/attention/wo/kernel", AS_IS),
    NameRow("layers.{layer}.mlp_norm", f"{_LAYER}/ffn_norm/kernel", AS_IS),
    NameRow("layers.{layer}.gate", f"{_LAYER}/feed_forward/w1/kernel", AS_IS),
    NameRow("layers.{layer}.up", f"{_LAYER}/feed_forward/w3/kernel", AS_IS),
    NameRow("layers.{layer}.down", f"{_LAYER}/feed_forward/w2/kernel", AS_IS),
    NameRow("norm", "transformer/ln_f/kernel", AS_IS),
    NameRow("head", "lm_head/kernel", AS_IS, "text"),
    NameRow("head", _VISION_HEAD, AS_IS, "vision"),
)

_ALIASES = {"theta": "rope_theta", "max_sequence_length": "max_position_embeddings"}
_VISION_KEYS = {"size": "vision_vocab_size", "codes": "vision_codes",
                "codes_per_frame": "vision_codes_per_frame"}  # fmt: skip


class _OriginalTensors:
    def __init__(self, file: Path, kind: str, config: LlamaConfig, scan_axis: int) -> None:
        source, count = f"{kind}::{file}", config.num_layers
        try:
            self._data = np.memmap(file, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); check the path") from error
        # Arrays, and for stacked layers the axis and the index of the layer.
        self._arrays: dict[str, tuple[StoredArray, int | None, int]] = {}
        stored = stored_tensors(ORIGINAL_NAMES, config).values()
        expected = {tensor.name: tensor.shape for parts in stored for tensor in parts}
        walker = Walker(self._data, source)
        for name, value in _entries(walker, kind):
            array = walker.array(value, name)
            if array is None:
                continue
            if not name.startswith(_STACKED):
                self._arrays[name] = (array, None, 0)
                continue
            layers = [name.replace(_STACKED, f"{_LAYER.format(layer=i)}/") for i in range(count)]
            shape = expected.get(layers[0], ())
            fits = [
                axis
                for axis in (scan_axis, 1 - scan_axis)
                if array.shape == (*shape[:axis], count, *shape[axis:])
            ]
            if not shape or not fits:
                raise CheckpointError(
                    f"{source}: the tensor {name!r} has shape {list(array.shape)}, but the "
                    f"configuration implies {count} layers of {list(shape)}; correct --config"
                )
            self._arrays |= {layer: (array, fits[0], i) for i, layer in enumerate(layers)}
        self.dtype = "/".join(sorted({str(array.dtype) for array, _, _ in self._arrays.values()}))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(n for i, n in enumerate(array.shape) if i != axis)
            for name, (array, axis, _) in self._arrays.items()
        }

    def read(self, name: str) -> np.ndarray:
        release_pages(self._data)
        array, axis, layer = self._arrays[name]
        view = array.view(self._data)
        if axis is None:
            return view
        return np.take(view, layer, axis) if axis else view[layer]


def _entries(walker: Walker, kind: str) -> Iterator[tuple[str, Any]]:
    if kind == "flax_params":
        tree = walker.value()
        while isinstance(tree, dict) and set(tree) == {"params"}:
            tree = tree["params"]
        if not isinstance(tree, dict):
            raise walker.fail("the file contains no map of parameters")
        yield from _flatten(tree, "")
        return
    prefix = ["params", "params"] if kind == "trainstate_params" else []
    empty = True
    while walker.offset < walker.end:
        match walker.value():
            case [list(key), value] if all(isinstance(part, str) for part in key):
                pass
            case _:
                raise walker.fail("a pair of a name and an array is needed")
        if key[: len(prefix)] != prefix:
            continue  # the optimizer's state, for example
        if isinstance(value, Region) and value.code is None:
            value = walker.inside(value).value()  # a stream wraps each array in binary data
        empty = False
        yield "/".join(key[len(prefix) :]), value
    if empty:
        raise CheckpointError(
            f"{walker.source} has no parameters under {'/'.join(prefix) or 'any name'}; "
            f"try another of the prefixes {', '.join(name + '::' for name in KINDS)}"
        )


def _flatten(tree: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{path}/{key}" if path else key
        if isinstance(value, dict) and CHUNKED not in value:
            yield from _flatten(value, name)
        else:
            yield name, value


def _read_settings(config: str | None) -> tuple[LlamaConfig, int]:
    choices = ", ".join(sizes.NAMES)
    if config is None:
        raise ConfigError(
            "this checkpoint does not contain its configuration; add --config with a size "
            f"({choices}) or a JSON file of the original's settings"
        )
    if config in sizes.NAMES:
        return sizes.size(config), 0
    if not Path(config).is_file():
        raise ConfigError(f"--config {config!r} is neither a size ({choices}) nor a file")
    data = {_ALIASES.get(key, key): value for key, value in read_json(Path(config)).items()}
    if "size" in data:
        keys = config_to_keys(sizes.size(str(data["size"])))
        data = keys | {"num_key_value_heads": None} | data
    model = config_from_keys(data | {"head_dim": None, "lwm_vision": None}, config)
    if model.num_kv_heads != model.num_heads or model.hidden_size % model.num_heads:
        raise ConfigError(
            f"{config}: num_attention_heads ({model.num_heads}) must equal num_key_value_heads "
            f"({model.num_kv_heads}) and divide hidden_size ({model.hidden_size})"
        )
    return replace(model, vision=_read_vision(data, config)), int(data.get("param_scan_axis") == 1)


def _read_vision(data: dict[str, Any], source: str) -> VisionVocabulary | None:
    # The original fixes 8192 codes, 256 per frame, and 256 more rows in its table. So without
    # `vision_codes`, a key of lwm, a table of more than 256 rows is taken to have that form,
    # and a smaller one to contain codes and two end tokens.
    values = {ours: data[theirs] for ours, theirs in _VISION_KEYS.items() if theirs in data}
    if "size" not in values:
        return None
    for ours, value in values.items():
        if type(value) is not int:
            raise ConfigError(f"{source}: {_VISION_KEYS[ours]} is {value!r}; use a whole number")
    size = values["size"]
    values.setdefault("codes", size - 256 if size > 256 else size - 2)
    return VisionVocabulary(**values)


def open_original(kind: str, file: Path, config: str | None) -> Checkpoint:
    """Open a checkpoint of the original by a prefix of `KINDS`, a file and `--config`."""
    source = f"{kind}::{file}"
    if not file.is_file():
        raise CheckpointError(f"{source}: there is no such file; check the path")
    model, scan_axis = _read_settings(config)
    tensors = _OriginalTensors(file, kind, model, scan_axis)
    _require_same_vision(tensors.shapes(), model, source)
    return Checkpoint(
        source=source,
        format=f"original ({kind})",
        stored_dtype=tensors.dtype,
        config=model,
        table=ORIGINAL_NAMES,
        tensors=tensors,
    )


def _require_same_vision(
    shapes: dict[str, tuple[int, ...]], config: LlamaConfig, source: str
) -> None:
    name = next((name for name in (_VISION_TABLE, _VISION_HEAD) if name in shapes), None)
    if name is not None and config.vision is None:
        size = shapes[name][0 if name == _VISION_TABLE else -1] if shapes[name] else 0
        raise CheckpointError(
            f"{source} is a vision-language checkpoint (it has {name!r}); add "
            f'"vision_vocab_size": {size} to the JSON file of --config, beside "size": "7b" or '
            "the like"
        )
    if name is None and config.vision is not None:
        raise CheckpointError(
            f"{source} is a text checkpoint (it has no {_VISION_TABLE!r}); omit vision_vocab_size "
            f"({config.vision.size}) from --config"
        )
