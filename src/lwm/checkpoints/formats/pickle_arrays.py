"""Read a pickle of nested dicts of arrays without running anything that it names.

A pickle is a program that may call any function. Here only instructions that build dicts, tuples,
numbers, strings and bytes are admitted, and every length must fit the file. The few names that a
pickle of arrays needs (of numpy, jax and Flax) are replaced by stand-ins that only record their
arguments, so not even numpy runs before shape and type are checked.

Sources: the `pickle` and `pickletools` modules; `numpy.ndarray.__reduce_ex__`.
"""

import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any, NamedTuple

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
_RECONSTRUCTORS = frozenset(
    """
    numpy.dtype numpy.ndarray flax.core.frozen_dict.FrozenDict _codecs.encode
    numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct
    numpy.core.numeric._frombuffer numpy._core.numeric._frombuffer
    jax._src.array._reconstruct_array jax._src.device_array.reconstruct_device_array
    """.split()  # noqa: SIM905
)
_DTYPES = {"f2": np.float16, "f4": np.float32, "f8": np.float64}
_MAX_BYTES = 16 << 30  # a VQGAN is a hundredth of this
_MAX_DEPTH = 32
_MAX_ENTRIES = 100_000
_MAX_MEMO = 1_000_000


class _Refused(Exception): ...


class _Dtype:
    # Stands for a numpy type.
    __slots__ = ("name", "order")

    def __init__(self, name: str) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: Any) -> None:
        match state:
            case (_, "<" | ">" | "=" | "|" as order, *_):
                self.order = order
            case _:
                raise _Refused("a type of numbers has no byte order")


class _Array:
    # Stands for an array until its bytes are read.
    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        match state:
            case (_, shape, dtype, fortran, bytes() as raw):
                self.fill(raw, dtype, shape, "F" if fortran else "C")
            case _:
                raise _Refused("an array has no numbers")

    def fill(self, raw: Any, dtype: Any, shape: Any, order: Any) -> None:
        if (
            not isinstance(raw, bytes | bytearray)
            or not isinstance(dtype, _Dtype)
            or not isinstance(shape, tuple)
            or not all(type(n) is int and n >= 0 for n in shape)
            or len(shape) > 8
            or order not in ("C", "F")
        ):
            raise _Refused("an array is not described as numpy does")
        if dtype.name not in _DTYPES:
            raise _Refused(f"an array holds {dtype.name!r}; numbers must be float16, 32 or 64")
        native = np.dtype(_DTYPES[dtype.name])
        if math.prod(shape) * native.itemsize != len(raw):
            raise _Refused(f"an array claims the shape {list(shape)} and has {len(raw):,} bytes")
        flat = np.frombuffer(raw, native.newbyteorder(dtype.order))  # type: ignore[arg-type]
        self.array = flat.reshape(shape, order=order).astype(native, copy=False)


class _Reconstructor(NamedTuple):
    # Stands for one of `_RECONSTRUCTORS`; immutable, so that a pickle cannot change it.
    name: str

    def __call__(self, *arguments: Any) -> Any:
        match self.name.rpartition(".")[2], arguments:
            case "dtype", (str(name), *_):
                return _Dtype(name)
            case "_reconstruct", _:
                return _Array()
            case "_frombuffer", (raw, dtype, shape, order):
                result = _Array()
                result.fill(raw, dtype, shape, order)
                return result
            case "_reconstruct_array" | "reconstruct_device_array", (
                _Reconstructor() as make,
                tuple(inner),
                state,
                *_,
            ):
                result = make(*inner)
                if isinstance(result, _Array) and state is not None:
                    result.__setstate__(state)
                return result
            case "FrozenDict", (dict(content),):
                return content
            case "encode", (str(text), "latin1"):
                return text.encode("latin1")
        raise _Refused(f"it calls {self.name} with unusual arguments")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Reconstructor:
        if f"{module}.{name}" not in _RECONSTRUCTORS:
            raise _Refused(f"it refers to {module}.{name}")
        return _Reconstructor(f"{module}.{name}")


def read_pickle(file: Path) -> dict[str, np.ndarray]:
    """Read arrays by their path in the nested dicts, joined by slashes; refuse anything else."""
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{file} exceeds {_MAX_BYTES >> 30} GB, so it is not a VQGAN")
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error}); check the path") from error
    try:
        _check_instructions(data)
        return _flatten(_Unpickler(io.BytesIO(data)).load())
    except _Refused as error:
        raise CheckpointError(
            f"{file} contains more than dicts of arrays ({error}), which could run code; use the "
            "original's file"
        ) from error
    except (
        pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError, AttributeError,
        EOFError, OverflowError, RecursionError, MemoryError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{file} is broken or cut short ({reason}); copy or download it again"
        ) from error


def _check_instructions(data: bytes) -> None:
    for instruction, argument, _ in pickletools.genops(data):  # checks every length
        if instruction.name not in _INSTRUCTIONS:
            raise _Refused(f"it contains the instruction {instruction.name}")
        if "PUT" in instruction.name and int(argument or 0) > _MAX_MEMO:
            raise _Refused(f"it numbers a value {argument}, above {_MAX_MEMO:,}")


def _flatten(tree: Any) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    waiting = [("", tree)]
    # Visits are counted because dicts that contain each other could unfold without end.
    for _ in range(_MAX_ENTRIES):
        if not waiting:
            return arrays
        path, value = waiting.pop()
        if isinstance(value, _Array) and value.array is not None:
            arrays[path] = value.array
            continue
        if not isinstance(value, dict) or path.count("/") > _MAX_DEPTH:
            raise _Refused(f"{path or 'the root'!r} is neither a dict nor an array")
        if not all(isinstance(key, str) for key in value):
            raise _Refused(f"a key of {path or 'the root'!r} is not a string")
        if len(waiting) + len(value) > _MAX_ENTRIES:
            break
        waiting += [(f"{path}/{key}" if path else key, inner) for key, inner in value.items()]
    raise _Refused(f"it contains more than {_MAX_ENTRIES:,} arrays and dicts")
