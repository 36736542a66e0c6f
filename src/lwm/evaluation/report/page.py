"""A run's results for people: its pictures, and one HTML page that needs nothing beside it.

Everything in the page is escaped text or a picture inside it: no script, no link, so it may be
mailed and opened years later. Knows rows and settings; knows no model and no task.
"""

import base64
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
from jinja2 import Environment
from matplotlib.figure import Figure

import lwm
from lwm.evaluation.report.plots import Rows, headline, pictures_of, replace_file, save, svg
from lwm.evaluation.report.scores import (
    Table,
    is_scored,
    kind_of,
    length_label,
    length_table,
    overall,
    percent,
    points_of,
    rounds,
    task_table,
    value_of,
)
from lwm.evaluation.results import ROWS

REPORT = "report.html"
_FAILING, _SHOWN = 10, 14  # transcripts: of failing rows, and in all
_LONGEST = 1500  # characters of a response


def write_report(
    directory: Path,
    settings: Mapping[str, Any],
    rows: Rows,
    *,
    keys: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    threshold: float | None = None,
    pictures: Mapping[str, Figure] | None = None,
    table: Table | None = None,
) -> Path:
    """Writes the pictures of a run as PNG and SVG, and its report, into its directory; those that
    are there are replaced.

    Args:
        settings: of the run; `evaluation`, `model` and `theta` make the title.
        keys: of all rows that are to come, so that what is missing shows.
        notes: sentences that stand below the title.
        threshold: per cent that counts as mastering a length; pictures of suites show it.
        pictures: further ones by name, behind those that rows with scores are shown by.
        table: in place of the scores by length or task.

    Returns:
        The report's path.

    Raises:
        InputError: rows have scores that are no numbers from 0 to 1, or no length.
    """
    title = title_of(settings)
    drawn: dict[str, Figure] = {}
    scored = bool(rows) and all(map(is_scored, rows))
    figures = [("answered", f"{len(rows):,} of {len(keys):,}" if keys else f"{len(rows):,}")]
    if scored:
        points = points_of(rows)
        lengths = sorted({point.length for point in points})
        span = " to ".join(dict.fromkeys(length_label(n) for n in (lengths[0], lengths[-1])))
        unit = "frames" if kind_of(rows) == "frames" else "tokens of context"
        figures = [
            ("score", f"{percent(overall(points))}%"), *figures,
            ("rounds", f"{rounds(rows)}"), (unit, span),
        ]  # fmt: skip
        drawn = pictures_of(rows, headline(title, rows), keys, threshold)
        if table is None:
            kind = kind_of(rows)
            table = task_table(points) if kind == "suite" else length_table(points, kind)
    drawn |= pictures or {}
    for name, figure in drawn.items():
        save(figure, directory / name)
    page = _render(
        title=title,
        notes=notes,
        figures=figures,
        pictures=drawn,
        table=table,
        transcripts=_transcripts(rows) if scored else [],
        rows=f"the {len(rows):,} rows in {ROWS}",
        facts=[
            ("Settings", [(name, _plain(value)) for name, value in settings.items()]),
            ("Made with", list(environment().items())),
        ],
    )
    path = directory / REPORT
    replace_file(path, page.encode())
    return path


def title_of(settings: Mapping[str, Any], otherwise: str = "results") -> str:
    """What a run is called: its test and its model."""
    named = [_plain(settings[name]) for name in ("evaluation", "model") if settings.get(name)]
    if settings.get("theta"):
        named.append(f"theta {settings['theta']:,.10g}")
    return " · ".join(named) or otherwise


def environment() -> dict[str, str]:
    """What computes here: versions, the device, and the revision where lwm is a checkout."""
    devices = jax.devices()
    found = {
        "lwm": lwm.__version__,
        "revision": revision(Path(lwm.__file__).parent),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "system": f"{platform.system()} {platform.machine()}",
    }
    return {name: value for name, value in found.items() if value}


def revision(package: Path) -> str:
    """Git's name for the state of a package that git keeps, else nothing."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout.strip()

    # A package that is installed below somebody's checkout is none of it.
    kept = git("ls-files", "--", "__init__.py")
    return git("describe", "--always", "--dirty", "--abbrev=12") if kept else ""


def write_page(
    path: Path, *, title: str, notes: Sequence[str], pictures: Mapping[str, Figure], table: Table
) -> None:
    """A report of pictures and a table, not of one run."""
    page = _render(
        title=title, notes=notes, figures=[], pictures=pictures, table=table, transcripts=[],
        rows="", facts=[("Made with", list(environment().items()))],
    )  # fmt: skip
    replace_file(path, page.encode())


def _render(*, pictures: Mapping[str, Figure], **told: Any) -> str:
    template = files("lwm.evaluation.report").joinpath("page.html").read_text(encoding="utf-8")
    inlined = [
        (name.replace("_", " "), base64.b64encode(svg(figure).encode()).decode())
        for name, figure in pictures.items()
    ]
    page = Environment(autoescape=True, trim_blocks=True).from_string(template)
    return page.render(pictures=inlined, **told)


def _plain(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return ", ".join(value)
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _transcripts(rows: Rows) -> list[dict[str, Any]]:
    """The failing rows first, as many as a reader will read."""
    told = [(value_of(row), row) for row in rows if "response" in row]
    told.sort(key=lambda pair: pair[0])
    failing = [pair for pair in told if pair[0] < 1]
    shown = failing[:_FAILING]
    shown += [pair for pair in told if pair[0] == 1][: _SHOWN - len(shown)]
    return [_transcript(value, row) for value, row in shown]


def _transcript(value: float, row: Mapping[str, Any]) -> dict[str, Any]:
    where = [
        (name, row.get(column))
        for name, column in (
            ("task", "task"), ("context", "context_length"), ("frames", "frames"),
            ("depth", "depth_percent"), ("seed", "seed"),
        )
    ]  # fmt: skip
    texts = [(name, row.get(name)) for name in ("question", "answer", "response")]
    tone = "right" if value == 1 else "wrong" if value == 0 else "partly"
    return {
        "tone": tone,
        "verdict": f"{tone}, {percent(value)}%" if tone == "partly" else tone,
        "where": ", ".join(f"{name} {_plain(v)}" for name, v in where if v is not None),
        "texts": [(name, _cut(_plain(text))) for name, text in texts if text is not None],
    }


def _cut(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]} … ({len(text) - _LONGEST:,} characters more)"
