"""Save a conversation and its cache, so that a long video or document is prefilled once.

The file is safetensors with positions in order, so that it fits any mesh; images and videos are
stored as codes, since their files may disappear.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lwm.attention.cached import LayerCache
from lwm.core.config import to_dict
from lwm.core.distributed import on_host
from lwm.core.errors import InputError
from lwm.core.files import new_file
from lwm.core.mesh import SEQUENCE
from lwm.data.text.templates import Message
from lwm.generation.model import Model
from lwm.generation.vision_prompts import Part, replace_media
from lwm.models.quantized import QuantizedKernel

_FORMAT = "lwm-session 1"
_STORED = {"float32": np.float32, "bfloat16": np.uint16}  # safetensors' numpy has no bfloat16


def save_session(path: Path, model: Model, messages: Sequence[Message]) -> None:
    """Write a conversation and the cache of the slot with the most tokens."""

    def encoded(part: Part) -> Part:
        return {"type": "codes", "codes": model.codes(part).tolist()}

    engine = model.engine_for(1, 1)
    slot, tokens = engine.scheduler.longest_slot()
    places = _places(len(tokens), engine.scheduler.capacity, model)
    arrays = {"tokens": np.array(tokens, np.int32)}
    for index, layer in enumerate(engine.cache):
        keys, values = np.asarray(layer.keys[slot]), np.asarray(layer.values[slot])
        arrays[f"keys.{index}"] = _plain(keys[:, :, places].swapaxes(1, 2))
        arrays[f"values.{index}"] = _plain(values[:, places])
    metadata = {
        "format": _FORMAT, "model": model_fingerprint(model), "dtype": model.dtype,
        "messages": json.dumps([replace_media(message, encoded) for message in messages]),
    }  # fmt: skip
    try:
        with new_file(path, replace=True) as partial:
            save_file(arrays, partial, metadata=metadata)
    except SafetensorError as error:
        raise InputError(
            f"the session {path} cannot be written: {error}; name another file"
        ) from error


def load_session(path: Path, model: Model) -> list[Message]:
    """Load a session into the model's cache, and return its conversation."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise InputError(f"{path} is not a session of 'lwm chat'; name another file")
            expected = (model_fingerprint(model), model.dtype)
            if (metadata.get("model"), metadata.get("dtype")) != expected:
                raise InputError(
                    f"the session {path} is of another model than {model.source} as "
                    f"{model.dtype}; load the one it was made with, or name another file"
                )
            messages = json.loads(metadata["messages"])
            tokens = file.get_tensor("tokens")
            engine = model.engine_for(len(tokens), 1)
            slot = engine.scheduler.fill_slot(tokens.tolist())
            places = _places(len(tokens), engine.scheduler.capacity, model)
            try:
                cache = engine.cache
                for index, layer in enumerate(cache):
                    cache[index] = _filled(layer, file, index, slot, places, model.dtype)
            except BaseException:
                engine.forget()  # earlier layers were donated
                raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the session {path} cannot be read ({reason}); start another") from error
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise InputError(f"the session {path} has no messages; start another")
    return messages


def _places(count: int, capacity: int, model: Model) -> Int[np.ndarray, " count"]:
    """Return the indices of the first positions in a slot; see `attention.order.striped`."""
    shards = 1 if model.mesh is None else model.mesh.shape[SEQUENCE]
    position = np.arange(count)
    return position % shards * (capacity // shards) + position // shards


def _plain(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x)


@lru_cache(maxsize=8)
def _row_writer(sharding: Sharding) -> Any:
    """Compile a function that replaces a row of an array, once for all layers."""
    return jax.jit(
        lambda old, row, new: old.at[row].set(new), donate_argnums=0, out_shardings=sharding
    )


def _filled(
    layer: LayerCache, file: Any, index: int, slot: int, places: np.ndarray, dtype: str
) -> LayerCache:
    """Return a layer's cache with a session's keys and values in one slot."""
    _, heads, capacity, dim = layer.values.shape

    def row(name: str) -> np.ndarray:
        stored, expected = file.get_tensor(name), (heads, len(places), dim)
        if stored.shape != expected or stored.dtype != _STORED[dtype]:
            raise ValueError(f"{name} has the shape {list(stored.shape)}, not {list(expected)}")
        whole = np.zeros((heads, capacity, dim), jnp.dtype(dtype))
        whole[:, places] = stored.view(whole.dtype)
        return whole

    def put(old: jax.Array, new: np.ndarray) -> jax.Array:
        return _row_writer(old.sharding)(old, np.int32(slot), new)

    keys, values = row(f"keys.{index}").swapaxes(1, 2), row(f"values.{index}")
    return LayerCache(put(layer.keys, keys), put(layer.values, values))


def model_fingerprint(model: Model) -> str:
    """Return a hash of a model's settings and of some weights, the same in every process."""
    digest = hashlib.sha256(json.dumps(to_dict(model.config)).encode())
    table = model.weights.embedding
    rows = table.rows(jnp.arange(16)) if isinstance(table, QuantizedKernel) else table[:16]
    for array in (model.weights.norm, rows):
        digest.update(on_host(array.astype(jnp.float32)).tobytes())
    return digest.hexdigest()
