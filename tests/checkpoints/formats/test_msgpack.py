"""Test the reader of msgpack files against the msgpack package and with broken files.

A broken file raises one `CheckpointError`, without allocating the sizes that it claims.
"""

import contextlib
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import flax_files
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwm.checkpoints.formats.msgpack import Region, Walker
from lwm.checkpoints.open import open_checkpoint
from lwm.core.errors import CheckpointError, LwmError

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=40)
    | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=5), inner, max_size=20)
    ),
    max_leaves=20,
)


def walker(data: bytes) -> Walker:
    return Walker(np.frombuffer(data, np.uint8), "a file")


def resolved(value: Any, data: bytes) -> Any:
    if isinstance(value, Region):
        return data[value.offset : value.offset + value.length]
    if isinstance(value, list):
        return [resolved(part, data) for part in value]
    if isinstance(value, dict):
        return {key: resolved(part, data) for key, part in value.items()}
    return value


@given(values)
@settings(max_examples=60, deadline=None)
def test_values_equal_those_of_the_msgpack_package(value: Any) -> None:
    data = flax_files.pack(value)
    reader = walker(data)
    assert resolved(reader.value(), data) == msgpack.unpackb(data, raw=False)
    assert reader.offset == len(data)


@given(st.floats(width=32, allow_nan=False))
@settings(max_examples=20, deadline=None)
def test_float32_values(value: float) -> None:
    assert walker(flax_files.pack(value, use_single_float=True)).value() == value


@given(st.integers(0, 70_000), st.integers(-128, 127))
@settings(max_examples=40, deadline=None)
def test_extension_values_keep_code_and_place(length: int, code: int) -> None:
    data = flax_files.pack(msgpack.ExtType(code, bytes(length)) if code >= 0 else bytes(length))
    region = walker(data).value()
    assert (region.offset + region.length, region.length) == (len(data), length)
    assert region.code == (code if code >= 0 else None)


@pytest.mark.parametrize("kind", ["params", "flax_params"])
@pytest.mark.parametrize(
    "announced",
    [
        b"\xc6" + b"\xff" * 4,  # bin32
        b"\xc5" + b"\xff" * 2,  # bin16
        b"\xc9" + b"\xff" * 4 + b"\x01",  # ext32
        b"\xdb" + b"\xff" * 4,  # str32
        b"\xdd" + b"\xff" * 4,  # array32
        b"\xdc" + b"\xff" * 2,  # array16
        b"\xdf" + b"\xff" * 4,  # map32
        b"\xde" + b"\xff" * 2,  # map16
        b"\xc1",  # begins no value
        b"\x91" * 5000 + b"\x00",  # nested too deeply
        b"\x81\xa1a" * 5000 + b"\x00",
        b"\x92\x91\xa1a\xc6" + b"\xff" * 4,  # a pair with an impossible array
        b"\x81\xa1a\xc9" + b"\xff" * 4 + b"\x01",  # a map with an impossible array
        b"",
    ],
)
def test_impossible_lengths_are_refused_without_allocating(
    tmp_path: Path, kind: str, announced: bytes
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(flax_files.SETTINGS), encoding="utf-8")
    file = tmp_path / "file"
    file.write_bytes(announced)
    model, config = f"{kind}::{file}", str(tmp_path / "config.json")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as raised:
            open_checkpoint(model, config=config)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (((2**40, 2**40), "float32", b"1234"), "has shape"),
        (((2**62, 4), "float32", b""), "has shape"),
        (((4,), "float32", b"1234"), "has shape"),
        (((-1,), "float32", b"1234"), "has the shape"),
        (((1,), "complex64", b"12345678"), "stored as complex64"),
        (((1,), "float32", "text"), "is not an array"),
        ([1, 2], "is not an array"),
    ],
)
def test_inconsistent_arrays_are_refused(value: Any, message: str) -> None:
    data = flax_files.pack(msgpack.ExtType(1, flax_files.pack(value)))
    reader = walker(data)
    with pytest.raises(CheckpointError, match=message):
        reader.array(reader.value(), "weight")


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": {"0": 3, "1": 4}},
        {"shape": {"0": 2**62, "1": 2**62}},
        {"shape": {"²": 12}},
        {"shape": 12},
        {"chunks": {}},
        {"chunks": {"0": 1}},
        {"chunks": {"0": flax_files.encode(np.zeros(10, np.float32)),
                    "1": flax_files.encode(np.zeros(4, np.float16))}},
        {"chunks": {"0": flax_files.encode(np.zeros(11, np.float32)),
                    "1": flax_files.encode(np.zeros(1, np.float16)),
                    "2": flax_files.encode(np.zeros(1, np.float16))},
         "shape": [12]},
    ],
)  # fmt: skip
def test_inconsistent_chunked_arrays_are_refused(changes: dict[str, Any]) -> None:
    whole = flax_files.encode_chunked(np.zeros((2, 5), np.float32), 4)
    data = flax_files.pack({**whole, **changes})
    reader = walker(data)
    with pytest.raises(CheckpointError, match="weight"):
        reader.array(reader.value(), "weight")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    arrays = flax_files.small_model()
    (directory / "config.json").write_text(json.dumps(flax_files.SETTINGS), encoding="utf-8")
    flax_files.write_stream(directory / "params", arrays)
    flax_files.write_map(
        directory / "flax_params",
        arrays,
        encoder=lambda array: flax_files.encode_chunked(array, 9),
    )
    return directory


@pytest.mark.parametrize("kind", ["params", "flax_params"])
def test_intact_files_contain_every_array(whole: Path, kind: str) -> None:
    checkpoint = open_checkpoint(f"{kind}::{whole / kind}", config=str(whole / "config.json"))
    result = dict(checkpoint.read())
    arrays = flax_files.small_model()
    np.testing.assert_array_equal(result["embedding"], arrays["transformer", "wte", "embedding"])
    query = arrays["transformer", "h", "1", "attention", "wq", "kernel"]
    np.testing.assert_array_equal(result["layers.1.query"], query)
    assert len(result) == len(arrays)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_random_damage_raises_no_other_error(whole: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["params", "flax_params"]))
    content = bytearray((whole / kind).read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        damage = data.draw(st.binary(min_size=1, max_size=8))
        content[at : at + len(damage)] = damage
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    file = whole / "damaged"
    file.write_bytes(content)
    with contextlib.suppress(LwmError):
        checkpoint = open_checkpoint(f"{kind}::{file}", config=str(whole / "config.json"))
        for _ in checkpoint.read():
            pass


@given(st.integers(0, 2**32 - 1), st.sampled_from([0xC6, 0xC9, 0xDB, 0xDD, 0xDF]), st.binary())
@settings(deadline=None)
def test_lengths_beyond_the_end_are_refused(length: int, tag: int, rest: bytes) -> None:
    content = bytes([tag]) + struct.pack(">I", length) + rest
    reader = walker(content)
    if length > len(rest):
        with pytest.raises(CheckpointError):
            reader.value()
