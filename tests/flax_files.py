"""Write and read checkpoints in the original's formats with the msgpack package."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

Arrays = dict[tuple[str, ...], np.ndarray]

SETTINGS = {
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_sequence_length": 64,
    "theta": 10000.0,
}
"""Settings of the smallest model that has every tensor."""


def pack(value: Any, **options: Any) -> bytes:
    packed = msgpack.packb(value, **options)
    assert packed is not None
    return packed


def small_model() -> Arrays:
    """Random arrays for `SETTINGS`, layers unrolled."""
    random = np.random.default_rng(0)
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {
        ("transformer", "wte", "embedding"): (8, 4),
        ("transformer", "ln_f", "kernel"): (4,),
        ("lm_head", "kernel"): (4, 8),
    }
    for layer in ("0", "1"):
        prefix = ("transformer", "h", layer)
        for name in ("wq", "wk", "wv", "wo"):
            shapes[(*prefix, "attention", name, "kernel")] = (4, 4)
        for name, shape in {"w1": (4, 6), "w2": (6, 4), "w3": (4, 6)}.items():
            shapes[(*prefix, "feed_forward", name, "kernel")] = shape
        for name in ("attention_norm", "ffn_norm"):
            shapes[(*prefix, name, "kernel")] = (4,)
    return {key: random.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def decode(value: Any) -> np.ndarray:
    assert value.code == 1
    shape, kind, raw = msgpack.unpackb(value.data, raw=False)
    dtype = ml_dtypes.bfloat16 if kind == "bfloat16" else np.dtype(kind)
    return np.frombuffer(raw, dtype).reshape(shape)


def encode(array: np.ndarray) -> Any:
    packed = pack((array.shape, array.dtype.name, array.tobytes()))
    return msgpack.ExtType(1, packed)


def encode_chunked(array: np.ndarray, size: int) -> dict[str, Any]:
    """Encode an array as Flax does above 2^30 bytes, with `size` numbers per chunk."""
    flat = array.reshape(-1)
    chunks = [flat[i : i + size] for i in range(0, flat.size, size)]
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): n for i, n in enumerate(array.shape)},
        "chunks": {str(i): encode(chunk) for i, chunk in enumerate(chunks)},
    }


def read_stream(file: Path) -> Arrays:
    with file.open("rb") as opened:
        unpacker = msgpack.Unpacker(opened, raw=False, max_buffer_size=1 << 30)
        return {tuple(key): decode(msgpack.unpackb(value)) for key, value in unpacker}


def write_stream(
    file: Path,
    arrays: Mapping[tuple[str, ...], np.ndarray],
    *,
    encoder: Callable[[np.ndarray], Any] = encode,
) -> Path:
    """Write a `params::` file, or with longer names a `trainstate_params::` file."""
    with file.open("wb") as opened:
        for key, array in arrays.items():
            value = pack(encoder(array))
            opened.write(pack((key, value)))
    return file


def write_map(
    file: Path,
    arrays: Mapping[tuple[str, ...], np.ndarray],
    *,
    encoder: Callable[[np.ndarray], Any] = encode,
) -> Path:
    """Write a `flax_params::` file."""
    tree: dict[str, Any] = {}
    for key, array in arrays.items():
        branch = tree
        for part in key[:-1]:
            branch = branch.setdefault(part, {})
        branch[key[-1]] = encoder(array)
    file.write_bytes(pack(tree))
    return file
