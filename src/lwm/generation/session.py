"""A conversation with what the cache holds of it, in a file: a long video is read once and asked
about on other days.

The file is safetensors, positions in order, so that it fits any mesh; pictures and videos are in
it as codes. Knows models, caches and messages; knows no terminal.
"""

import hashlib
import json
import os
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
from lwm.core.mesh import SEQUENCE
from lwm.data.text.templates import Message
from lwm.generation.model import Model
from lwm.generation.vision_prompts import has_vision
from lwm.models.quantized import QuantizedKernel

_FORMAT = "lwm-session 1"
_WORD = {"float32": np.float32, "bfloat16": np.uint16}  # safetensors' numpy has no bfloat16


def save_session(path: Path, model: Model, messages: Sequence[Message]) -> None:
    """Writes a conversation and the cache of its longest beginning, whole or not at all; a file
    that is there is replaced.

    Raises:
        InputError: the file cannot be written.
    """
    engine = model.engine_for(1, 1)
    slot, tokens = engine.scheduler.longest_slot()
    places = _places(len(tokens), engine.scheduler.capacity, model)
    arrays = {"tokens": np.array(tokens, np.int32)}
    for number, layer in enumerate(engine.cache):
        keys, values = np.asarray(layer.keys[slot]), np.asarray(layer.values[slot])
        arrays[f"keys.{number}"] = _plain(keys[:, :, places].swapaxes(1, 2))
        arrays[f"values.{number}"] = _plain(values[:, places])
    told = [_with_codes(model, message) for message in messages]
    facts = {
        "format": _FORMAT, "model": model_fingerprint(model), "dtype": model.dtype,
        "messages": json.dumps(told),
    }  # fmt: skip
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(arrays, partial, metadata=facts)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"the session {path} cannot be written: {error}; make room") from error
    finally:
        partial.unlink(missing_ok=True)


def load_session(path: Path, model: Model) -> list[Message]:
    """Puts what a session holds into the model's cache; returns its conversation.

    Raises:
        InputError: the file is no session, is broken, or of another model.
        CapacityError: its cache does not fit into memory.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata() or {}
            if facts.get("format") != _FORMAT:
                raise InputError(f"{path} is no session of 'lwm chat'; name another file")
            if (facts.get("model"), facts.get("dtype")) != (model_fingerprint(model), model.dtype):
                raise InputError(
                    f"the session {path} is of another model than {model.source} as "
                    f"{model.dtype}; load the one it was made with, or name another file"
                )
            messages = json.loads(facts["messages"])
            tokens = file.get_tensor("tokens")
            engine = model.engine_for(len(tokens), 1)
            slot = engine.scheduler.fill_slot(tokens.tolist())
            places = _places(len(tokens), engine.scheduler.capacity, model)
            try:
                for number, layer in enumerate(engine.cache):
                    engine.cache[number] = _held(layer, file, number, slot, places, model.dtype)
            except BaseException:
                engine.forget()  # layers before the one that failed were given away
                raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the session {path} cannot be read ({reason}); begin another") from error
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise InputError(f"the session {path} holds no messages; begin another")
    return messages


def _places(count: int, capacity: int, model: Model) -> Int[np.ndarray, " count"]:
    """Where in a slot the first positions lie; see `attention.order.striped`."""
    shards = 1 if model.mesh is None else model.mesh.shape[SEQUENCE]
    position = np.arange(count)
    return position % shards * (capacity // shards) + position // shards


def _plain(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x)


@lru_cache(maxsize=8)
def _writer(sharding: Sharding) -> Any:
    """Replaces a row of an array; compiled once for all layers."""
    return jax.jit(
        lambda old, row, new: old.at[row].set(new), donate_argnums=0, out_shardings=sharding
    )


def _held(
    layer: LayerCache, file: Any, number: int, slot: int, places: np.ndarray, dtype: str
) -> LayerCache:
    """A layer's cache with a session's keys and values in one slot."""

    def put(old: jax.Array, new: np.ndarray) -> jax.Array:
        return _writer(old.sharding)(old, np.int32(slot), new)

    def row(name: str, shape: tuple[int, ...], axis: int) -> np.ndarray:
        found = file.get_tensor(name)
        heads, _, dim = sized = (layer.values.shape[1], len(places), layer.values.shape[3])
        if found.shape != sized or found.dtype != _WORD[dtype]:
            raise ValueError(f"{name} has the shape {list(found.shape)}, not {list(sized)}")
        found = found.view(jnp.dtype(dtype))
        whole = np.zeros((heads, shape[axis], dim), found.dtype)
        whole[:, places] = found
        return whole

    keys = row(f"keys.{number}", layer.keys.shape, 3).swapaxes(1, 2)
    values = row(f"values.{number}", layer.values.shape, 2)
    return LayerCache(put(layer.keys, keys), put(layer.values, values))


def _with_codes(model: Model, message: Message) -> Message:
    """A message whose pictures and videos are codes, since files come and go."""
    if not has_vision([message]):
        return message
    content = [
        part
        if part.get("type") == "text"
        else {"type": "codes", "codes": model.codes(part).tolist()}
        for part in message["content"]
    ]
    return {**message, "content": content}


def model_fingerprint(model: Model) -> str:
    """Tells models apart by their settings and some of their weights, in every process alike."""
    found = hashlib.sha256(json.dumps(to_dict(model.config)).encode())
    table = model.weights.embedding
    rows = table.rows(jnp.arange(16)) if isinstance(table, QuantizedKernel) else table[:16]
    for array in (model.weights.norm, rows):
        found.update(on_host(array.astype(jnp.float32)).tobytes())
    return found.hexdigest()
