"""`lwm data`: look at training data and make some."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lwm.cli.flags import Load, LoadFlags, ModelName
from lwm.cli.train import configure
from lwm.core.errors import ConfigError, InputError
from lwm.core.files import refuse_existing
from lwm.core.progress import say


@dataclass(frozen=True)
class _Shown:
    """How much is shown."""

    rows: int = 2
    """Rows to show."""


def inspect(arguments: Sequence[str]) -> None:
    """Show rows of a recipe's data, decoded, and count its tokens.

    Args:
        arguments: what follows `lwm data inspect`: a recipe's name, --rows, the recipe's settings.
    """
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(
            "write 'lwm data inspect RECIPE [--rows N] ...', with a recipe of 'lwm train --list' "
            "and its settings"
        )
    name, *settings = arguments
    shown, rest = tyro.cli(_Shown, args=settings, return_unknown_args=True, add_help=False)
    run = configure(name, rest, "data inspect")
    from lwm.recipes.inspection import inspect_rows

    for line in inspect_rows(run, shown.rows):
        print(line)


def inspect_help() -> None:
    """Stands for `inspect` in the list of verbs."""


def questions(
    model: ModelName,
    book: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="BOOK",
            help="A txt, md, html or pdf file, or 'book' for the King James Bible, 'book:Ruth' "
            "for one of its books.",
        ),
    ],
    /,
    out: Path,
    chunk_tokens: int = 1000,
    length: int = 8000,
    chunks: int | None = None,
    tries: int = 8,
    temperature: float = 0.0,
    seed: int = 0,
    load: Load = LoadFlags(),
) -> None:
    """Have a model write questions and answers about a book, as long chat examples.

    Interrupted and called again, it goes on where it was: what the model wrote is kept chunk by
    chunk beside --out, in OUT.chunks.jsonl.

    Args:
        out: File to write, JSON lines for 'lwm train chat --data.path'.
        chunk_tokens: Longest piece of the book that a question is asked about.
        length: Most tokens of an example.
        chunks: Only the first so many chunks of the book.
        tries: Times that a chunk is asked about before it is dropped.
        temperature: 0 takes the likeliest token; higher is more varied.
        seed: The same seed gives the same questions.
    """
    from lwm.curation.book_questions import (
        ChunkRecord,
        QuestionConfig,
        chunks_file,
        write_questions,
    )

    config = QuestionConfig(
        chunk_tokens=chunk_tokens, tries=tries, temperature=temperature, seed=seed
    )
    refuse_existing(out)
    if not out.parent.is_dir():
        raise InputError(f"the directory {out.parent} does not exist; make it or name another")
    if chunks is not None and chunks < 1:
        raise InputError(f"--chunks is {chunks}; it must be at least 1")
    text = _read_book(book)
    writer = load.load(model)

    def report(record: ChunkRecord, total: int) -> None:
        outcome = record.question or f"dropped ({record.refused[-1]})"
        say(f"chunk {record.chunk + 1} of {total}: {outcome}")

    summary = write_questions(
        writer, text, out, config, length=length, most_chunks=chunks, report=report
    )
    say(f"({summary}; what was written for each chunk is kept in {chunks_file(out)})")
    print(out)


def _read_book(book: str) -> str:
    from lwm.data.text.books import king_james_bible
    from lwm.data.text.documents import read_document

    name, colon, part = book.partition(":")
    if name == "book" and not Path(book).exists():
        return king_james_bible(part if colon else None)
    return read_document(Path(book))
