"""Hugging Face datasets, from the hub or from a local directory, through their own library."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lwm.core.errors import InputError
from lwm.data.sources.source import Record

PREFIX = "hf:"
_SAVED = ("dataset_info.json", "dataset_dict.json")  # by the library's save_to_disk


def stream_rows(name: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a dataset in order, fetched as they are read: nothing is kept on disk.

    Args:
        name: as `HuggingFace` takes it.

    Raises:
        InputError: the library is not installed, or the dataset cannot be read.
    """
    rows = iter(_load(name, streaming=True))
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise _unreadable(name, error) from error
        if row is None:
            return
        yield row


class HuggingFace:
    """The rows of a dataset.

    Args:
        name: a directory, a name on the hub, or `NAME:CONFIGURATION:SPLIT`; the split is train
            unless given.

    Raises:
        InputError: the library is not installed, or cannot load the dataset.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._rows = _load(name, streaming=False)
        if not len(self._rows):
            raise InputError(f"the dataset {name!r} has no rows; name another split")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Record | None:
        return self._rows[index]

    def place(self, index: int) -> tuple[str, int]:
        return self._name, index + 1


def _load(name: str, *, streaming: bool) -> Any:
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError as error:
        raise InputError(
            "Hugging Face datasets need a package that is not installed; get it with 'pip "
            "install lwm[huggingface]'"
        ) from error
    dataset, _, rest = name.partition(":")
    configuration, _, split = rest.partition(":")
    split = split or "train"
    given: dict[str, Any] = {"streaming": True} if streaming else {}
    try:
        if any((Path(dataset) / file).is_file() for file in _SAVED):
            rows = datasets.load_from_disk(dataset)
            return rows[split] if isinstance(rows, dict) else rows
        return datasets.load_dataset(dataset, configuration or None, split=split, **given)
    except Exception as error:  # the library and the network fail in any way
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> InputError:
    return InputError(
        f"the dataset {name!r} cannot be loaded ({' '.join(str(error).split())}); check its name, "
        "as in hf:NAME:CONFIGURATION:SPLIT"
    )
