"""MODEL: one string that names a model, wherever it is. Resolved here and nowhere else."""

from pathlib import Path

from lwm.checkpoints.checkpoint import Checkpoint
from lwm.checkpoints.formats.gguf import open_gguf
from lwm.checkpoints.formats.huggingface import open_huggingface
from lwm.checkpoints.formats.lwm import FORMAT, open_native
from lwm.checkpoints.formats.original import KINDS, open_original
from lwm.checkpoints.formats.run import is_run, open_run
from lwm.checkpoints.known import KNOWN, download, find_known
from lwm.core.config import override, read_json
from lwm.core.errors import CheckpointError, ConfigError


def open_checkpoint(model: str, *, config: str | None = None) -> Checkpoint:
    """Opens and verifies a checkpoint without loading it.

    Args:
        model: a directory (ours, Hugging Face Llama, or a training run), a `.gguf` file,
            `params::FILE`,
            `trainstate_params::FILE`, `flax_params::FILE`, `hf:OWNER/NAME`, or a known name.
        config: a size or a JSON file, for the original's checkpoints.

    Raises:
        CheckpointError: nothing is there, or what is there cannot be read.
        ConfigError: `config` is missing, wrong, or given where it does not belong.
    """
    checkpoint = _open(model, config)
    checkpoint.verify()
    return checkpoint


def _open(model: str, config: str | None) -> Checkpoint:
    kind, separator, file = model.partition("::")
    if separator:
        if kind not in KINDS:
            raise CheckpointError(
                f"the prefix {kind + '::'!r} of {model!r} is not known; use one of "
                f"{', '.join(name + '::' for name in KINDS)}"
            )
        return open_original(kind, Path(file), config)
    if config is not None:
        raise ConfigError(
            f"--config {config!r} belongs to the original's checkpoints (params::FILE and the "
            "like); "
            f"{model!r} says itself what it is, so leave --config out"
        )
    if model.startswith("hf:"):
        return _open_path(download(model.removeprefix("hf:")), model)
    if model in KNOWN and not Path(model).exists():
        return _open_known(model)
    return _open_path(Path(model), model)


def _open_known(name: str) -> Checkpoint:
    known = KNOWN[name]
    if known.vision:
        settings = (
            '{"size": "7b", "vision_vocab_size": 8448, '
            f'"theta": {known.theta:g}, "max_sequence_length": {known.length}}}'
        )
        raise CheckpointError(
            f"{name} is published in the original's format alone; download {known.repository} "
            f"and name its file as params::FILE with --config a JSON file that holds {settings}"
        )
    checkpoint = _open_path(find_known(name), name)
    # The released files do not agree on where they keep theta, so the table rules.
    changed = override(checkpoint.config, rope_theta=known.theta, max_sequence_length=known.length)
    return override(checkpoint, config=changed, source=name)


def _open_path(path: Path, model: str) -> Checkpoint:
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return open_gguf(path)
        raise CheckpointError(
            f"{model!r} is a file of unknown kind; name a .gguf file, a model directory, or write "
            "params::FILE for a checkpoint of the original"
        )
    if not path.is_dir():
        raise CheckpointError(
            f"there is no model {model!r}: neither a file, nor a directory, nor a known name; see "
            "'lwm info --list'"
        )
    if is_run(path):
        return open_run(path, model, open_checkpoint)
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"the directory {model!r} has no config.json; name a model directory of lwm or "
            "Hugging Face"
        )
    ours = read_json(path / "config.json").get("format") == FORMAT
    return open_native(path) if ours else open_huggingface(path)
