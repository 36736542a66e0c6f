"""Safetensors files: one, or several with an index, read by slices and written in parts of bounded
size."""

import json
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy for the reader
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lwm.core.config import read_json
from lwm.core.errors import CheckpointError, InputError, LwmError

PART_BYTES = 4 << 30
"""A file larger than this is split, and an index says where each tensor went."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class SafetensorsDirectory:
    """Tensors of `model.safetensors`, or of the files its index names."""

    def __init__(self, directory: Path) -> None:
        self._where: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        for file in _files(directory):
            try:
                with safe_open(file, framework="numpy") as opened:
                    for name in opened.keys():  # noqa: SIM118  not a dict
                        piece = opened.get_slice(name)
                        self._where[name] = file
                        self._shapes[name] = tuple(piece.get_shape())
                        self._dtypes[name] = piece.get_dtype()
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file} is broken or cut short ({error}); copy or download it again"
                ) from error
        odd = {name: kind for name, kind in self._dtypes.items() if kind not in _DTYPES}
        for name, kind in odd.items():
            raise CheckpointError(
                f"{directory}: the tensor {name!r} is stored as {kind}, which is not supported; "
                f"convert it to one of {', '.join(_DTYPES.values())}"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def stored(self) -> str:
        return "/".join(sorted({_DTYPES[kind] for kind in self._dtypes.values()}))

    def read(self, name: str) -> np.ndarray:
        # Opened for each tensor: what an open file has read stays mapped, and memory would grow to
        # the whole model.
        with safe_open(self._where[name], framework="numpy") as opened:
            return opened.get_tensor(name)


def is_complete(directory: Path) -> bool:
    """Whether all files of weights are there."""
    try:
        return bool(_files(directory))
    except LwmError:
        return False


def _files(directory: Path) -> list[Path]:
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if not (directory / INDEX).is_file():
        raise CheckpointError(
            f"{directory} holds neither {SINGLE} nor {INDEX}; name a directory with safetensors "
            "weights"
        )
    mapping = read_json(directory / INDEX).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(v, str) for v in mapping.values()):
        raise CheckpointError(
            f"{directory / INDEX} has no weight_map of names to files; replace it"
        )
    files = []
    for name in sorted(set(mapping.values())):
        file = directory / name
        if file.parent != directory or not file.is_file():
            raise CheckpointError(
                f"{directory / INDEX} names the file {name!r}, which is not there; the download "
                "is incomplete"
            )
        files.append(file)
    return files


def write(
    directory: Path, tensors: Iterable[tuple[str, np.ndarray]], *, part_bytes: int = PART_BYTES
) -> None:
    """Writes tensors as they come, holding one part of at most `part_bytes` in memory.

    The index counts bytes as Hugging Face's does, so that `from_pretrained` reads the directory.
    """
    parts: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        nonlocal held, size
        try:
            save_file(held, directory / f"part-{len(parts)}", metadata={"format": "pt"})
        except SafetensorError as error:
            raise InputError(
                f"{directory.parent} cannot be written ({error}); make room or choose another"
            ) from error
        parts.append(list(held))
        held, size = {}, 0

    for name, array in tensors:
        if held and size + array.nbytes > part_bytes:
            flush()
        held[name] = np.ascontiguousarray(array)
        size += array.nbytes
        total += array.nbytes
    flush()
    if len(parts) == 1:
        (directory / "part-0").rename(directory / SINGLE)
        return
    weight_map = {}
    for i, names in enumerate(parts):
        file = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        (directory / f"part-{i}").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
