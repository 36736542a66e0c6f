"""Read and write our model directory: `config.json`, `model.safetensors` under our names,
`tokenizer.json`, and `vqgan/` for a vision-language model."""

import json
from pathlib import Path
from typing import Any

from lwm.checkpoints.checkpoint import Checkpoint, vqgan_in
from lwm.checkpoints.formats.safetensors import SafetensorsDirectory
from lwm.checkpoints.names import LWM_NAMES
from lwm.core.config import from_dict, read_json, to_dict
from lwm.core.errors import CheckpointError
from lwm.models.llama import LlamaConfig

VERSION = 1
_FORMATS = {"model": "lwm", "vqgan": "lwm-vqgan"}
"""What `config.json` calls the format of each kind of directory."""


def is_lwm(path: Path) -> bool:
    """Return whether a path is a model directory that `lwm` wrote."""
    file = path / "config.json"
    return file.is_file() and read_json(file).get("format") == _FORMATS["model"]


def open_lwm(directory: Path) -> Checkpoint:
    """Open a model directory that `lwm` wrote."""
    settings = read_own_settings(directory, "model")
    tensors = SafetensorsDirectory(directory)
    return Checkpoint(
        source=str(directory),
        format="lwm",
        stored_dtype=tensors.dtype,
        config=from_dict(LlamaConfig, settings, str(directory / "config.json")),
        table=LWM_NAMES,
        tensors=tensors,
        vocabulary=directory,
        vqgan=vqgan_in(directory),
    )


def write_lwm_config(directory: Path, config: LlamaConfig, dtype: str) -> None:
    """Write `config.json`; `dtype` is not part of it, because the tensors have it."""
    write_own_settings(directory, "model", to_dict(config))


def read_own_settings(directory: Path, kind: str) -> dict[str, Any]:
    """Read lwm's `config.json`; raise CheckpointError if it has another format or version."""
    file = directory / "config.json"
    data = read_json(file)
    ours, version = data.get("format") == _FORMATS[kind], data.get("version")
    if ours and version != VERSION:
        raise CheckpointError(
            f"{file} has format version {version!r} and this lwm reads {VERSION}; update lwm"
        )
    if not ours or not isinstance(data.get(kind), dict):
        raise CheckpointError(f"{file} has no settings of a {kind}; name another directory")
    return data[kind]


def write_own_settings(directory: Path, kind: str, settings: dict[str, Any]) -> None:
    """Write a `config.json` that `read_own_settings` reads."""
    data = {"format": _FORMATS[kind], "version": VERSION, kind: settings}
    (directory / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
