"""`lwm eval compare`: several results in one table and one picture."""

from pathlib import Path
from typing import Annotated

import tyro

from lwm.core.progress import say


def compare(
    results: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RESULTS...", help="Directories of runs, or files of rows."),
    ],
    /,
    out: Path | None = None,
    title: str = "Comparison",
) -> None:
    """Compare several results: scores at each length and over all, one column a run.

    Files of rows that the original wrote are compared, too. A suite's runs are compared with
    suites, videos with videos, and perplexities where they are of the same tokens.

    Args:
        out: Directory to write compare.png, compare.svg and compare.html to; none unless given.
        title: Of the picture and the page.
    """
    from lwm.evaluation.report import compare as comparison

    found = comparison.compare(results)
    print(found.table)
    if out is not None:
        say("wrote " + ", ".join(str(path) for path in comparison.write(found, out, title)))
