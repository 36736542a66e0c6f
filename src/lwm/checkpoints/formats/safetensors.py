"""Read and write directories of safetensors: one file, or several files with an index."""

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
"""The largest file written; a larger model is split into several with an index."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class SafetensorsDirectory:
    """Provide the tensors of `model.safetensors`, or those that an index names, each from the file
    that it names; what else is in these files is not part of the model."""

    def __init__(self, directory: Path) -> None:
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        dtypes: set[str] = set()
        for file, indexed in _files(directory).items():
            try:
                with safe_open(file, framework="numpy") as opened:
                    present = opened.keys()
                    names = present if indexed is None else indexed
                    if lacking := set(names).difference(present):
                        raise CheckpointError(
                            f"{directory / INDEX} names the tensor {min(lacking)!r} in {file.name}"
                            ", which lacks it; copy or download both again"
                        )
                    for name in names:
                        tensor = opened.get_slice(name)
                        self._files[name] = file
                        self._shapes[name] = tuple(tensor.get_shape())
                        dtypes.add(tensor.get_dtype())
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file} is broken or cut short ({error}); copy or download it again"
                ) from error
        unknown = sorted(dtypes - _DTYPES.keys())
        if unknown:
            raise CheckpointError(
                f"{directory} has tensors stored as {', '.join(unknown)}; convert them to one of "
                f"{', '.join(_DTYPES.values())}"
            )
        self.dtype = "/".join(sorted(_DTYPES[dtype] for dtype in dtypes))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        # The file is opened for each tensor, because an open file keeps mapped what was read and
        # memory would grow to the whole model.
        with safe_open(self._files[name], framework="numpy") as opened:
            return opened.get_tensor(name)


def is_complete(directory: Path) -> bool:
    """Return whether all files of weights exist."""
    try:
        return bool(_files(directory))
    except LwmError:
        return False


def _files(directory: Path) -> dict[Path, list[str] | None]:
    """Return the files of weights, with the tensors that an index names in each."""
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():  # transformers, too, prefers it to an index
        return {single: None}
    if not index.is_file():
        raise CheckpointError(f"{directory} has neither {SINGLE} nor {INDEX}; name another")
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(v, str) for v in mapping.values()):
        raise CheckpointError(f"{index} has no weight_map of names to files; replace it")
    present = {path.name for path in directory.iterdir() if path.is_file()}
    files: dict[Path, list[str] | None] = {}
    for name in sorted(set(mapping.values())):
        if name not in present:
            raise CheckpointError(
                f"{index} names the file {name!r}, which is not beside it; download it again"
            )
        files[directory / name] = [tensor for tensor, file in mapping.items() if file == name]
    return files


def write_safetensors(
    directory: Path, tensors: Iterable[tuple[str, np.ndarray]], *, part_bytes: int = PART_BYTES
) -> None:
    """Write tensors in order, with at most `part_bytes` of them in memory."""
    parts: list[list[str]] = []
    part: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        path = directory / f"part-{len(parts)}"
        path.touch()
        mode = path.stat().st_mode
        try:
            save_file(part, path, metadata={"format": "pt"})
        except SafetensorError as error:
            message = f"{directory.parent} cannot be written ({error}); make room there"
            raise InputError(message) from error
        path.chmod(mode)  # the library makes its files private, and models are shared
        parts.append(list(part))
        part.clear()

    for name, array in tensors:
        if part and sum(each.nbytes for each in part.values()) + array.nbytes > part_bytes:
            flush()
        part[name] = np.ascontiguousarray(array)
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
