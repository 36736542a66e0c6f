"""Our model directory: `config.json`, `model.safetensors` under our own names,
`tokenizer.json`, and `vqgan/` where it sees."""

import json
from pathlib import Path

from lwm.checkpoints.checkpoint import Checkpoint, vqgan_in
from lwm.checkpoints.formats.safetensors import SafetensorsDirectory
from lwm.checkpoints.names import NATIVE
from lwm.core.config import from_dict, read_json, to_dict
from lwm.core.errors import CheckpointError
from lwm.models.llama import LlamaConfig

FORMAT, VERSION = "lwm", 1


def open_native(directory: Path) -> Checkpoint:
    """A directory that `lwm` wrote.

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
        stored=tensors.stored(),
        config=from_dict(LlamaConfig, model, str(path)),
        table=NATIVE,
        tensors=tensors,
        vocabulary=directory,
        vqgan=vqgan_in(directory),
    )


def write_config(directory: Path, config: LlamaConfig) -> None:
    data = {"format": FORMAT, "version": VERSION, "model": to_dict(config)}
    (directory / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
