"""Inspect, write and export training data: `lwm data`."""

from collections.abc import Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lwm.cli.flags import Load, LoadFlags, ModelName
from lwm.cli.parsing import UsageError, parse
from lwm.cli.train import default_run
from lwm.core.errors import InputError
from lwm.core.files import refuse_existing
from lwm.core.progress import say


def inspect(arguments: Sequence[str]) -> None:
    """Show rows of a recipe's data, and count its tokens."""
    usage = "lwm data inspect RECIPE [--rows N] ...; 'lwm train --list' names the recipes"
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"usage: {usage}\n\n{inspect.__doc__}")
        return
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(f"lwm data inspect: the recipe must come first: {usage}")
    from lwm.recipes.inspection import inspect_rows
    from lwm.recipes.settings import TrainingRun

    name, *settings = arguments
    rows = Annotated[int, tyro.conf.arg(help="Number of rows to show.")]
    run = Annotated[TrainingRun, tyro.conf.arg(name="")]
    inspection = make_dataclass("Inspection", [("rows", rows, 2), ("run", run)], kw_only=True)
    result = parse(
        inspection, f"lwm data inspect {name}", settings,
        default=inspection(run=default_run(name, settings)),
        description=f"Show rows of the data of the recipe {name}, and count its tokens.",
    )  # fmt: skip
    for line in inspect_rows(result.run, result.rows):
        print(line)


def questions(
    model: ModelName,
    book: str,
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
    """Write long chat examples: a model asks and answers about a book.

    A repeated command continues an interrupted run, from OUT.chunks.jsonl.

    Args:
        book: 'book' (the King James Bible), 'book:Ruth', or a txt, md, html, pdf, docx or epub
            file.
        out: JSON lines file to write, for 'lwm train chat --data.path'.
        chunk_tokens: Maximum length in tokens of the passage that a question is about.
        length: Maximum length of an example in tokens.
        chunks: Number of chunks to use, from the start of the book; defaults to all.
        tries: Attempts at each chunk before it is dropped.
        temperature: 0 takes the most likely token; higher values are more varied.
        seed: Seed of the sampling; the same seed gives the same questions.
    """
    from lwm.curation.book_questions import (
        ChunkRecord,
        QuestionConfig,
        chunks_file,
        write_questions,
    )
    from lwm.data.text.documents import read_text

    config = QuestionConfig(
        chunk_tokens=chunk_tokens, tries=tries, temperature=temperature, seed=seed
    )
    refuse_existing(out)
    if not out.parent.is_dir():
        raise InputError(f"the directory {out.parent} does not exist; make it or name another")
    if chunks is not None and chunks < 1:
        raise InputError(f"--chunks is {chunks}; it must be at least 1")
    text = read_text(book)
    writer = load.load(model)

    def report(record: ChunkRecord, total: int) -> None:
        outcome = record.question or f"dropped ({record.refused[-1]})"
        say(f"chunk {record.chunk + 1} of {total}: {outcome}")

    summary = write_questions(
        writer, text, out, config, length=length, most_chunks=chunks, report=report
    )
    say(f"({summary}; the questions of each chunk are in {chunks_file(out)})")
    print(out)


def export(
    source: str,
    /,
    out: Path,
    field: str = "text",
    rows: int | None = None,
    characters: int | None = None,
) -> None:
    """Export one field of a data set as JSON lines, with the key text.

    Args:
        source: hf:NAME, hf:NAME:CONFIGURATION:SPLIT, the directory of a Hugging Face data set, a
            Parquet or JSON lines file, a glob, a URL, or 'book'.
        out: File to write.
        field: Field whose text is exported.
        rows: Maximum number of rows.
        characters: Maximum number of characters; the last text is truncated to fit.
    """
    from lwm.curation.export import export_texts

    say(f"({export_texts(source, out, field=field, rows=rows, characters=characters)})")
    print(out)


def world(
    kind: Annotated[
        Literal["pictures", "tokenizer", "lists", "texts", "images", "videos", "long-videos"],
        tyro.conf.Positional,
        tyro.conf.arg(
            help="What to write.",
            metavar="{pictures,tokenizer,lists,texts,images,videos,long-videos}",
        ),
    ],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    /,
    count: int = 1000,
    seed: int = 0,
    held_out: bool = False,
    length: int = 1024,
    tokenizer: Path | None = None,
    vqgan: Path | None = None,
) -> None:
    """Write the data of the nano world model: named things in pictures, videos and texts.

    Args:
        count: Number of pictures or examples.
        seed: Seed of the world; the same seed writes the same data.
        held_out: Write images or videos of combinations that training data never shows.
        length: Maximum length of an example of lists or texts, in tokens.
        tokenizer: Tokenizer that counts the tokens of lists and texts.
        vqgan: VQGAN that encodes images and videos.
    """
    from lwm.curation.world import writing
    from lwm.curation.world.drawing import require_art
    from lwm.data.text.tokenizer import read_tokenizer
    from lwm.generation.codec import load_vqgan

    refuse_existing(out)
    if count < 1:
        raise InputError(f"--count is {count}; it must be at least 1")
    if held_out and kind not in writing.EXAMPLES:
        raise InputError(f"--held-out is of images and videos, not of {kind}; leave it out")
    if kind == "pictures" or kind in writing.EXAMPLES:
        require_art()
    match kind:
        case "pictures":
            writing.write_pictures(out, count, seed)
        case "tokenizer":
            writing.write_tokenizer(out, seed)
        case "lists" | "texts":
            if tokenizer is None:
                raise InputError(f"{kind} have a length in tokens; add --tokenizer")
            writing.write_texts(out, kind, count, length, read_tokenizer(tokenizer), seed)
        case "images" | "videos" | "long-videos":
            if vqgan is None:
                raise InputError(f"{kind} are written as codes; add --vqgan")
            writing.write_examples(out, kind, count, load_vqgan(vqgan), seed, held_out=held_out)
    print(out)
