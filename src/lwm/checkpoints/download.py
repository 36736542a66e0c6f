"""Find repositories of the hub in its cache, or download them there.

The hub's library discards what an interrupted process has downloaded of a file, which for weights
may be gigabytes. So they are downloaded here, into the place where the library looks for them.
"""

import fcntl
import os
from pathlib import Path
from urllib.parse import urlsplit

from rich.filesize import decimal

from lwm.checkpoints.formats.huggingface import is_huggingface
from lwm.checkpoints.formats.safetensors import is_complete
from lwm.core.errors import CheckpointError
from lwm.core.progress import say

_WEIGHTS = ".safetensors"
_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")


def hub_directory(repository: str) -> Path | None:
    """Return the newest complete download of a repository in the hub's cache, or None."""
    snapshots = _cache() / _directory_name(repository) / "snapshots"
    complete = [path for path in snapshots.glob("*") if is_huggingface(path) and is_complete(path)]
    return max(complete, key=lambda path: path.stat().st_mtime, default=None)


def download(repository: str) -> Path:
    """Return the directory of a hub repository, downloading it unless it is in the cache.

    Progress is shown on standard error, and an interrupted download continues where it ended.
    """
    cached = hub_directory(repository)
    if cached is not None:
        return cached
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{repository} is not on this machine; install the extra with 'pip install "
            "lwm[huggingface]' to download it, or name a directory that contains it"
        ) from error
    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        info = HfApi(endpoint=endpoint).model_info(repository)
        for file in info.siblings or ():
            if file.rfilename.endswith(_WEIGHTS):
                _download_weights(repository, file.rfilename, info.sha, endpoint)
        path = snapshot_download(
            repository, revision=info.sha, allow_patterns=[*_FILES], endpoint=endpoint,
            cache_dir=_cache(),
        )  # fmt: skip
    except Exception as error:  # errors of the libraries that the hub's library is based on
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{repository} cannot be downloaded ({reason}); check the name and the network and "
            "try again, or name a directory that contains it"
        ) from error
    return Path(path)


def _download_weights(
    repository: str, name: str, revision: str | None, endpoint: str | None
) -> None:
    """Download a file to its place among the blobs of the hub's cache."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repository, name, revision=revision, endpoint=endpoint)
    metadata = get_hf_file_metadata(url)
    assert metadata.etag is not None
    blob = _cache() / _directory_name(repository) / "blobs" / metadata.etag
    blob.parent.mkdir(parents=True, exist_ok=True)
    if blob.exists():
        return
    partial = blob.with_name(f"{blob.name}.partial")
    with partial.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another process may be downloading it
        if blob.exists():
            return
        say(
            f"downloading {name} of {repository}, {decimal(metadata.size or 0)}"
            + (f", from {decimal(file.tell())} on" if file.tell() else "")
        )
        same_host = urlsplit(metadata.location).netloc == urlsplit(url).netloc
        http_get(
            metadata.location, file, resume_size=file.tell(), expected_size=metadata.size,
            headers=build_hf_headers() if same_host else None, displayed_filename=name,
        )  # fmt: skip
        partial.rename(blob)


def _cache() -> Path:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub"))


def _directory_name(repository: str) -> str:
    return f"models--{repository.replace('/', '--')}"
