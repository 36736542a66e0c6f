"""Open the records that a user's path names: files, globs, URLs, datasets, the book."""

import glob
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lwm.core.errors import InputError
from lwm.data.sources import array_record, parquet
from lwm.data.sources.cache import expand_url, is_url, local_file
from lwm.data.sources.json_lines import JsonLines
from lwm.data.sources.source import Joined, RecordSource, SequenceSource, input_errors
from lwm.data.text.book import named_chapters

PREFIX = "hf:"
"""Mark of a Hugging Face dataset: a directory or a name, or `NAME:CONFIGURATION:SPLIT`."""
_SAVED = ("dataset_info.json", "dataset_dict.json")  # by the library's save_to_disk
_FORMATS: dict[str, Callable[[Path, str], RecordSource]] = {
    "jsonl": JsonLines,
    "parquet": parquet.Parquet,
    "array_record": array_record.ArrayRecord,
}


def open_records(path: str, format: str = "auto") -> RecordSource:
    """Open everything that a path names, in the order of its parts."""
    parts = [part.strip() for part in path.split(",") if part.strip()]
    if not parts:
        raise InputError(
            "no data is given; name a file, a glob, a URL, hf:NAME or book with --data.path"
        )
    sources = [source for part in parts for source in _open_part(part, format)]
    return sources[0] if len(sources) == 1 else Joined(sources)


def _open_part(part: str, format: str) -> list[RecordSource]:
    if (chapters := named_chapters(part)) is not None:
        return [
            SequenceSource("the King James Bible", [chapter._asdict() for chapter in chapters])
        ]
    if format == "huggingface" or (part.startswith(PREFIX) and not is_url(part)):
        return [_open_dataset(part.removeprefix(PREFIX))]
    names = expand_url(part) if is_url(part) else _files(part)
    return [_open_file(name, format) for name in names]


def _open_file(name: str, format: str) -> RecordSource:
    file = local_file(name)
    if format == "auto":
        with file.open("rb") as opened:
            head = opened.read(8)
        magic = {parquet.MAGIC: "parquet", array_record.MAGIC: "array_record"}
        format = next((magic[key] for key in magic if head.startswith(key)), "jsonl")
    return _FORMATS[format](file, name)


def _files(part: str) -> list[str]:
    path = Path(part).expanduser()
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        raise InputError(f"{part} is a directory; name a file in it, or add /*.jsonl")
    files = sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not files:
        raise InputError(f"no data file matches {part}; check the path")
    return files


def stream_rows(name: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a dataset in order, fetched as they are read and not stored."""
    with _loading(name):
        yield from _load(name, streaming=True)


def _open_dataset(name: str) -> SequenceSource:
    rows = _load(name)
    if not len(rows):
        raise InputError(f"the dataset {name!r} has no rows; name another split")
    return SequenceSource(name, rows)


def _load(name: str, **options: Any) -> Any:
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
    with _loading(name):
        if any((Path(dataset) / file).is_file() for file in _SAVED):
            rows = datasets.load_from_disk(dataset)
            return rows[split] if isinstance(rows, dict) else rows
        return datasets.load_dataset(dataset, configuration or None, split=split, **options)


def _loading(name: str) -> AbstractContextManager[None]:
    return input_errors(
        f"the dataset {name!r} cannot be loaded",
        "check its name, as in hf:NAME:CONFIGURATION:SPLIT",
    )
