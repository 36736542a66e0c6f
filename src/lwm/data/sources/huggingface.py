"""Hugging Face datasets, from the hub or from a local directory, through their own library."""

from pathlib import Path
from typing import Any

from lwm.core.errors import InputError
from lwm.data.sources.source import Record

PREFIX = "hf:"
_SAVED = ("dataset_info.json", "dataset_dict.json")  # by the library's save_to_disk


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
        try:
            import datasets  # type: ignore[import-not-found]
        except ImportError as error:
            raise InputError(
                "Hugging Face datasets need a package that is not installed; get it with 'pip "
                "install lwm[huggingface]'"
            ) from error
        dataset, _, rest = name.partition(":")
        configuration, _, split = rest.partition(":")
        try:
            split = split or "train"
            if any((Path(dataset) / file).is_file() for file in _SAVED):
                rows = datasets.load_from_disk(dataset)
                self._rows: Any = rows[split] if isinstance(rows, dict) else rows
            else:
                self._rows = datasets.load_dataset(dataset, configuration or None, split=split)
        except Exception as error:  # the library and the network fail in any way
            raise InputError(
                f"the dataset {name!r} cannot be loaded ({' '.join(str(error).split())}); check "
                "its name, as in hf:NAME:CONFIGURATION:SPLIT"
            ) from error
        if not len(self._rows):
            raise InputError(f"the dataset {name!r} has no rows; name another split")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Record | None:
        return self._rows[index]

    def place(self, index: int) -> tuple[str, int]:
        return self._name, index + 1
