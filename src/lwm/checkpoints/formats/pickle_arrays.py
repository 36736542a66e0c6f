"""A pickle of nested dicts of arrays, read without letting it run anything.

A pickle is a program for a small machine that may call whatever it names. Here the instructions
are looked through first: only those that build dicts, tuples, numbers, text and bytes are let in,
and every length is checked against the file. Then the names it may use (of numpy's arrays and
types, jax's arrays and Flax's dicts) lead to stand-ins that remember what they were given, so that
not even numpy runs before shape and type are checked. Knows pickles; knows nothing of models.

Sources: the `pickle` and `pickletools` modules; `numpy.ndarray.__reduce_ex__`.
"""

import io
import itertools
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from lwm.core.errors import CheckpointError

_INSTRUCTIONS = frozenset(
    """
    PROTO FRAME STOP MARK POP MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1
    UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS
    EMPTY_DICT DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD
    """.split()  # noqa: SIM905  a table is easier to check
)
_TYPES = {"f2": np.float16, "f4": np.float32, "f8": np.float64}
_MAX_BYTES = 16 << 30  # a VQGAN is a hundredth of this
_MAX_DEPTH = 32
_MAX_ENTRIES = 100_000
_MAX_MEMO = 1_000_000


class _Refused(Exception):
    """What the file asks for is not part of a dict of arrays."""


class _Type:
    """Stands for a numpy type: what it was called, then its byte order."""

    __slots__ = ("name", "order")

    def __init__(self, name: str) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "=", "|"):
            raise _Refused("a type of numbers has no byte order")
        self.order = state[1]

    def numpy(self) -> np.dtype:
        if self.name not in _TYPES:
            raise _Refused(f"an array holds {self.name!r}; numbers must be float16, 32 or 64")
        return np.dtype(_TYPES[self.name]).newbyteorder(self.order)  # type: ignore[arg-type]


class _Array:
    """Stands for an array until its bytes come."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        match state:
            case (_, tuple() as shape, _Type() as kind, fortran, bytes() as raw):
                self.array = _array(raw, kind, shape, "F" if fortran else "C")
            case _:
                raise _Refused("an array has no numbers")


def _array(raw: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    if (
        not isinstance(raw, bytes | bytearray)
        or not isinstance(kind, _Type)
        or not isinstance(shape, tuple)
        or not all(type(n) is int and n >= 0 for n in shape)
        or len(shape) > 8
        or order not in ("C", "F")
    ):
        raise _Refused("an array is not described as numpy does")
    dtype = kind.numpy()
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise _Refused(f"an array claims the shape {list(shape)} and has {len(raw):,} bytes")
    flat = np.frombuffer(raw, dtype)
    return flat.reshape(shape, order=order).astype(dtype.newbyteorder("="), copy=False)


class _Callable:
    """Stands for a function that a pickle may call. It has no attributes that could be set."""

    __slots__ = ()


class _NewType(_Callable):
    __slots__ = ()

    def __call__(self, name: Any, *_: Any) -> _Type:
        return _Type(name) if isinstance(name, str) else _Type("an unknown type")


class _NewArray(_Callable):
    __slots__ = ()

    def __call__(self, *_: Any) -> _Array:
        return _Array()


class _ArrayClass(_Callable):
    """`numpy.ndarray`, which is handed on and never called."""

    __slots__ = ()


class _FromBuffer(_Callable):
    __slots__ = ()

    def __call__(self, raw: Any, kind: Any, shape: Any, order: Any) -> _Array:
        made = _Array()
        made.array = _array(raw, kind, shape, order)
        return made


class _JaxArray(_Callable):
    __slots__ = ()

    def __call__(self, make: Any, arguments: Any, state: Any, *_: Any) -> _Array:
        if not isinstance(make, _NewArray | _FromBuffer) or not isinstance(arguments, tuple):
            raise _Refused("a jax array is not made of a numpy array")
        made = make(*arguments)
        if state is not None:
            made.__setstate__(state)
        return made


class _Latin(_Callable):
    """`_codecs.encode`: how protocol 2 writes bytes."""

    __slots__ = ()

    def __call__(self, text: Any, encoding: Any) -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise _Refused("bytes are not written in latin1")
        return text.encode("latin1")


class _Dict(_Callable):
    __slots__ = ()

    def __call__(self, content: Any) -> dict:
        if not isinstance(content, dict):
            raise _Refused("a dict has no content")
        return content


_NAMES: dict[tuple[str, str], _Callable] = {
    ("numpy", "dtype"): _NewType(),
    ("numpy", "ndarray"): _ArrayClass(),
    ("numpy.core.multiarray", "_reconstruct"): _NewArray(),
    ("numpy._core.multiarray", "_reconstruct"): _NewArray(),
    ("numpy.core.numeric", "_frombuffer"): _FromBuffer(),
    ("numpy._core.numeric", "_frombuffer"): _FromBuffer(),
    ("jax._src.array", "_reconstruct_array"): _JaxArray(),
    ("jax._src.device_array", "reconstruct_device_array"): _JaxArray(),
    ("flax.core.frozen_dict", "FrozenDict"): _Dict(),
    ("_codecs", "encode"): _Latin(),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise _Refused(f"it asks for {module}.{name}")
        return _NAMES[module, name]


def read_pickle(file: Path) -> dict[str, np.ndarray]:
    """Arrays by their path in the nested dicts, joined by slashes.

    Raises:
        CheckpointError: the file cannot be read, is broken, or holds or does anything else.
    """
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise CheckpointError(
                f"{file} is larger than {_MAX_BYTES >> 30} GB; it is no VQGAN, name another file"
            )
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read: {error.strerror}; check the path"
        ) from error
    try:
        _look_through(data)
        tree = _Unpickler(io.BytesIO(data)).load()
        return _flatten(tree)
    except _Refused as error:
        raise CheckpointError(
            f"{file} is not a pickle of arrays and dicts alone ({error}), and nothing else is "
            "admitted, since a pickle can run code; take the original's file"
        ) from error
    except (
        pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError, AttributeError,
        EOFError, OverflowError, RecursionError, MemoryError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{file} is broken or cut short ({reason}); copy or download it again"
        ) from error


def _look_through(data: bytes) -> None:
    """Refuses instructions that do more than build values; `genops` checks every length."""
    for instruction, argument, _ in pickletools.genops(data):
        if instruction.name not in _INSTRUCTIONS:
            raise _Refused(f"it holds the instruction {instruction.name}")
        if "PUT" in instruction.name and int(argument or 0) > _MAX_MEMO:
            raise _Refused("it numbers its values absurdly")


def _flatten(tree: Any) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    waiting: list[tuple[str, Any, int]] = [("", tree, 0)]
    # Counted, since dicts that hold each other by name could unfold without end.
    for visited in itertools.count():
        if not waiting:
            return arrays
        path, value, depth = waiting.pop()
        if isinstance(value, _Array):
            if value.array is None:
                raise _Refused(f"the array {path!r} has no numbers")
            arrays[path] = value.array
            continue
        if not isinstance(value, dict) or depth > _MAX_DEPTH:
            raise _Refused(f"{path or 'the whole'!r} is neither a dict nor an array")
        if not all(isinstance(key, str) for key in value):
            raise _Refused(f"a key of {path or 'the whole'!r} is no text")
        if visited + len(waiting) + len(value) > _MAX_ENTRIES:
            raise _Refused(f"it holds more than {_MAX_ENTRIES:,} arrays and dicts")
        below = f"{path}/" if path else ""
        waiting += [(below + key, inner, depth + 1) for key, inner in value.items()]
    raise AssertionError
