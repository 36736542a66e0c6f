"""Read and write our model directory: `config.json`, `model.safetensors` under our names,
`tokenizer.json`, and `vqgan/` for a vision-language model."""

import json
from pathlib import Path

from lwm.checkpoints.checkpoint import Checkpoint, vqgan_in
from lwm.checkpoints.formats.safetensors import SafetensorsDirectory
from lwm.checkpoints.names import LWM_NAMES
from lwm.core.config import from_dict, read_json, to_dict
from lwm.core.errors import CheckpointError
from lwm.models.llama import LlamaConfig

FORMAT, VERSION = "lwm", 1


def is_lwm(path: Path) -> bool:
    """Return whether a path is a directory that `lwm` wrote.

    Raises:
        ConfigError: its `config.json` is not a JSON object.
    """
    file = path / "config.json"
    return file.is_file() and read_json(file).get("format") == FORMAT


def open_lwm(directory: Path) -> Checkpoint:
    """Open a directory that `lwm` wrote.

    Raises:
        CheckpointError: it was written by a later version, or files are broken.
        ConfigError: its settings are wrong.
    """
    path = directory / "config.json"
    data = read_json(path)
    if data.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {data.get('version')!r} and this lwm reads {VERSION}; "
            "update lwm"
        )
    model = data.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{path} has no settings under 'model'; the directory is incomplete")
    tensors = SafetensorsDirectory(directory)
    return Checkpoint(
        source=str(directory),
        format="lwm",
        stored_dtype=tensors.dtype(),
        config=from_dict(LlamaConfig, model, str(path)),
        table=LWM_NAMES,
        tensors=tensors,
        vocabulary=directory,
        vqgan=vqgan_in(directory),
    )


def write_lwm_config(directory: Path, config: LlamaConfig, dtype: str) -> None:
    """Write `config.json`; `dtype` is not part of it, because the tensors have it."""
    data = {"format": FORMAT, "version": VERSION, "model": to_dict(config)}
    (directory / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
