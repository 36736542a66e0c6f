"""Read Hugging Face datasets, from the hub or from a local directory."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lwm.core.errors import InputError
from lwm.data.sources.source import Record

PREFIX = "hf:"
_SAVED = ("dataset_info.json", "dataset_dict.json")  # by the library's save_to_disk


def stream_rows(name: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a dataset in order, fetched as they are read and not stored.

    Args:
        name: as for `HuggingFace`.

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
    """Read the rows of a dataset.

    Args:
        name: a directory, a name on the hub, or `NAME:CONFIGURATION:SPLIT`; the split defaults to
            train.

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
        """Return one row."""
        return self._rows[index]

    def place(self, index: int) -> tuple[str, int]:
        """Return the dataset and the row's number."""
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
    options: dict[str, Any] = {"streaming": True} if streaming else {}
    try:
        if any((Path(dataset) / file).is_file() for file in _SAVED):
            rows = datasets.load_from_disk(dataset)
            return rows[split] if isinstance(rows, dict) else rows
        return datasets.load_dataset(dataset, configuration or None, split=split, **options)
    except Exception as error:  # the library and the network raise anything
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> InputError:
    return InputError(
        f"the dataset {name!r} cannot be loaded ({' '.join(str(error).split())}); check its name, "
        "as in hf:NAME:CONFIGURATION:SPLIT"
    )
