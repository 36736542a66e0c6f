"""Test the reader of pickles with files of numpy and jax, and with hostile ones."""

import contextlib
import os
import pickle
import random
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lwm.checkpoints.formats.pickle_arrays import read_pickle
from lwm.core.errors import CheckpointError

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "c": np.arange(3, dtype=np.float16),
    "d": np.arange(4, dtype=">f4"),
    "e": np.array(2, np.float32),
}


def write(file: Path, tree: object, protocol: int = 4) -> Path:
    file.write_bytes(pickle.dumps(tree, protocol=protocol))
    return file


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_every_protocol_and_byte_order_is_read(tmp_path, protocol) -> None:
    result = read_pickle(write(tmp_path / "x", {"up": {"down": ARRAYS}}, protocol))
    assert sorted(result) == [f"up/down/{name}" for name in ARRAYS]
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(result[f"up/down/{name}"], array)


def test_modules_of_numpy_1_and_2_are_known(tmp_path) -> None:
    data = pickle.dumps(ARRAYS, protocol=0)
    assert b"numpy._core" in data
    for version in (data, data.replace(b"numpy._core", b"numpy.core")):
        (tmp_path / "x").write_bytes(version)
        assert set(read_pickle(tmp_path / "x")) == set(ARRAYS)


@pytest.mark.parametrize("protocol", [4, 5])
def test_jax_arrays_are_read(tmp_path, protocol) -> None:
    result = read_pickle(write(tmp_path / "x", {"w": jnp.arange(4.0)}, protocol))
    assert result["w"].tolist() == [0, 1, 2, 3]


class Hostile:
    def __init__(self, call: object, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_in_a_pickle_runs(tmp_path, protocol) -> None:
    marker = tmp_path / "marker"
    for call in (
        Hostile(os.system, f"touch {marker}"),
        Hostile(eval, f"open({str(marker)!r}, 'w')"),
        Hostile(np.save, str(marker), 1),
        Hostile(np.memmap, str(marker), "uint8", "w+", 0, (4,)),
    ):
        file = write(tmp_path / "x", {"encoder": {**ARRAYS, "evil": call}}, protocol)
        with pytest.raises(CheckpointError, match="more than dicts of arrays"):
            read_pickle(file)
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]
    pickle.loads(pickle.dumps(Hostile(os.system, f"touch {marker}")))  # the payload does work
    assert marker.exists()


def test_stand_ins_are_immutable(tmp_path) -> None:
    # GLOBAL numpy dtype; BUILD with a state that would set attributes on it.
    for state in (b"}U\x01aK\x01s", b"N}U\x01aK\x01s\x86"):
        (tmp_path / "x").write_bytes(b"\x80\x02cnumpy\ndtype\n" + state + b"b.")
        with pytest.raises(CheckpointError):
            read_pickle(tmp_path / "x")


def test_reconstructors_refuse_unusual_arguments(tmp_path) -> None:
    for call in (
        b"cnumpy\nndarray\n)R.",
        b"cnumpy\ndtype\nK\x01\x85R.",
        b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf-8\x86R.",
        b"cflax.core.frozen_dict\nFrozenDict\nK\x01\x85R.",
        b"cjax._src.array\n_reconstruct_array\ncnumpy\nndarray\n)N\x87R.",
    ):
        (tmp_path / "x").write_bytes(b"\x80\x02" + call)
        with pytest.raises(CheckpointError, match="unusual arguments"):
            read_pickle(tmp_path / "x")


def exponential() -> dict:
    tree: dict = {"a": np.zeros(1)}
    for _ in range(30):
        tree = {str(i): tree for i in range(10)}
    return tree


def recursive() -> dict:
    tree: dict = {}
    tree["a"] = tree
    return tree


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([np.zeros(2)], "neither a dict nor an array"),
        ({1: np.zeros(2)}, "not a string"),
        ({"a": "text"}, "neither a dict nor an array"),
        ({"a": np.zeros(2, np.int32)}, "'i4'"),
        ({"a": np.array([None])}, "more than dicts of arrays"),
        ({"a": np.float32(1)}, "numpy._core.multiarray.scalar"),
        ({"a": {1, 2}}, "EMPTY_SET"),
        (exponential(), "more than"),
        (recursive(), "neither a dict nor an array"),
    ],
)
def test_other_values_are_refused(tmp_path, tree, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_pickle(write(tmp_path / "x", tree))


def test_impossible_sizes_are_refused(tmp_path) -> None:
    data = pickle.dumps({"a": np.zeros((2, 3), np.float32)}, protocol=4)
    at = data.index(b"K\x02K\x03")  # the shape, two small integers
    claimed = data[:at] + b"J\xff\xff\xff\x7f" + data[at + 2 :]
    claimed = claimed[:2] + b"\x95" + (len(claimed) - 11).to_bytes(8, "little") + claimed[11:]
    (tmp_path / "x").write_bytes(claimed)
    with pytest.raises(CheckpointError, match=r"claims the shape \[2147483647, 3\]"):
        read_pickle(tmp_path / "x")
    for body in (
        b"\x80\x05\x96" + b"\xff" * 7 + b"\x00.",  # BYTEARRAY8 of 2^56 bytes
        b"\x80\x04N\x72\xff\xff\xff\xff.",  # LONG_BINPUT at 2^32
        b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f.",  # a frame of 2^63 bytes
    ):
        (tmp_path / "x").write_bytes(body)
        with pytest.raises(CheckpointError):
            read_pickle(tmp_path / "x")


def test_broken_files_raise_checkpoint_errors(tmp_path) -> None:
    data = pickle.dumps({"a": {"b": np.arange(4, dtype=np.float32)}}, protocol=4)
    generator = random.Random(0)
    cut = [data[:n] for n in range(0, len(data), 3)]
    for broken in cut + [_mutated(data, generator) for _ in range(1000)]:
        (tmp_path / "x").write_bytes(broken)
        with contextlib.suppress(CheckpointError):  # anything else fails the test
            read_pickle(tmp_path / "x")
    for broken in cut:
        (tmp_path / "x").write_bytes(broken)
        with pytest.raises(CheckpointError):
            read_pickle(tmp_path / "x")
    with pytest.raises(CheckpointError, match="No such file"):
        read_pickle(tmp_path / "absent")


def _mutated(data: bytes, generator: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        changed[generator.randrange(len(changed))] = generator.randrange(256)
    return bytes(changed)
