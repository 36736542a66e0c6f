"""`lwm data export`: one field of a data set as JSON lines, for haystacks and for training."""

from pathlib import Path
from typing import Annotated

import tyro

from lwm.core.progress import say


def export(
    source: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="SOURCE",
            help="hf:NAME or hf:NAME:CONFIGURATION:SPLIT, the directory of a Hugging Face data "
            "set, a Parquet or JSON lines file, a glob, a URL, or 'book'.",
        ),
    ],
    /,
    out: Path,
    field: str = "text",
    rows: int | None = None,
    characters: int | None = None,
) -> None:
    """Write one field of a data set as JSON lines with the key 'text'.

    Args:
        out: File to write.
        field: Whose text is written.
        rows: Write so many rows at most.
        characters: Write so many characters at most; the last text is cut to fit.
    """
    from lwm.curation.export import export_texts

    say(f"({export_texts(source, out, field=field, rows=rows, characters=characters)})")
    print(out)
