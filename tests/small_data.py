"""Make a tokenizer of bytes, files of examples, and batches for the tests of training data."""

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lwm.data.config import DataConfig
from lwm.data.loader import Loader
from lwm.data.rows.packing import Row
from lwm.data.text.tokenizer import Tokenizer, train_tokenizer

TEXTS = [f"In the beginning was line {i}, and {'so it went on ' * (i % 7)}." for i in range(60)]
_LOADER = {"sequence_length", "batch_size", "rows", "split", "vocab_size", "vision"}


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


def ids(text: str) -> list[int]:
    return tokenizer().encode(text, specials=False)


def write_lines(path: Path, values: Iterable[Any]) -> Path:
    """Write JSON lines; bytes are written unchanged."""
    lines = [v if isinstance(v, bytes) else json.dumps(v).encode() for v in values]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def records() -> list[dict[str, str]]:
    return [{"text": text} for text in TEXTS]


def loader(path: Path | str, **settings: Any) -> Loader:
    """Open a loader of rows of 32 tokens in batches of 4, by settings of either class."""
    arguments: dict[str, Any] = {"sequence_length": 32, "batch_size": 4}
    arguments |= {name: settings.pop(name) for name in _LOADER & settings.keys()}
    every: dict[str, Any] = {"prefetch": 0} | settings
    return Loader(DataConfig(path=str(path), **every), tokenizer(), **arguments)


def take(batches: Loader, count: int) -> list[Row]:
    return [next(batches) for _ in range(count)]


def assert_same(left: list[Row], right: list[Row]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
