"""Write the report of a run: its figures, and one self-contained HTML page.

All text in the page is escaped and all images are inside it; it has no scripts and no links.
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
from lwm.core.files import new_file
from lwm.evaluation.report.plots import figures_of, headline, save_figure, svg
from lwm.evaluation.report.scores import (
    Table,
    count_rounds,
    is_scored,
    kind_of_rows,
    length_label,
    length_table,
    overall,
    percent,
    points_of,
    score_of,
    task_table,
)
from lwm.evaluation.results import ROWS, Rows

REPORT = "report.html"
_MAX_FAILING, _MAX_TRANSCRIPTS = 10, 14
_MAX_RESPONSE = 1500  # characters


def write_report(
    directory: Path,
    settings: Mapping[str, Any],
    rows: Rows,
    *,
    keys: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    threshold: float | None = None,
    figures: Mapping[str, Figure] | None = None,
    table: Table | None = None,
) -> Path:
    """Write or replace the figures and the page of a run, and return the page's path.

    Args:
        keys: of all rows of the run, so that the page shows how many are missing.
        notes: sentences below the title.
        threshold: score in percent from which a length counts as effective, for suites.
        figures: further figures by name.
        table: replaces the table of scores.
    """
    title, drawn = title_of(settings), dict[str, Figure]()
    scored = bool(rows) and all(map(is_scored, rows))
    summary = [("answered", f"{len(rows):,} of {len(keys):,}" if keys else f"{len(rows):,}")]
    if scored:
        summary = _score_summary(rows, summary)
        drawn = figures_of(rows, headline(title, rows), keys, threshold)
        points, kind = points_of(rows), kind_of_rows(rows)
        table = table or (task_table(points) if kind == "suite" else length_table(points, kind))
    drawn |= figures or {}
    for name, figure in drawn.items():
        save_figure(figure, directory / name)
    path = directory / REPORT
    write_page(
        path, title, drawn,
        notes=notes, summary=summary, table=table,
        transcripts=_transcripts(rows) if scored else [],
        rows=f"the {len(rows):,} rows in {ROWS}",
        settings=[(name, _plain(value)) for name, value in settings.items()],
    )  # fmt: skip
    return path


def write_page(path: Path, title: str, figures: Mapping[str, Figure], **values: Any) -> None:
    """Render page.html with further values, and write it."""
    template = files("lwm.evaluation.report").joinpath("page.html").read_text(encoding="utf-8")
    inlined = [
        (name.replace("_", " "), base64.b64encode(svg(figure).encode()).decode())
        for name, figure in figures.items()
    ]
    page = Environment(autoescape=True, trim_blocks=True).from_string(template)
    text = page.render(title=title, figures=inlined, environment=environment(), **values)
    with new_file(path, replace=True) as partial:
        partial.write_text(text, encoding="utf-8")


def _score_summary(rows: Rows, answered: list[tuple[str, str]]) -> list[tuple[str, str]]:
    points = points_of(rows)
    lengths = [point.length for point in points]
    span = dict.fromkeys(length_label(n) for n in (min(lengths), max(lengths)))
    unit = "frames" if kind_of_rows(rows) == "frames" else "tokens of context"
    return [
        ("score", f"{percent(overall(points))}%"), *answered,
        ("rounds", f"{count_rounds(rows)}"), (unit, " to ".join(span)),
    ]  # fmt: skip


def title_of(settings: Mapping[str, Any], default: str = "results") -> str:
    """Return the title of a run: its evaluation, model and theta."""
    parts = [_plain(settings[name]) for name in ("evaluation", "model") if settings.get(name)]
    theta = settings.get("theta")
    if isinstance(theta, int | float) and 0 < theta < 1e300:
        parts.append(f"theta {theta:,.10g}")
    return " · ".join(parts) or default


def environment() -> dict[str, str]:
    """Return versions, the device, and the revision if lwm is imported from a checkout."""
    devices = jax.devices()
    facts = {
        "lwm": lwm.__version__,
        "revision": revision(Path(lwm.__file__).parent),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "system": f"{platform.system()} {platform.machine()}",
    }
    return {name: value for name, value in facts.items() if value}


def revision(package: Path) -> str:
    """Return git's description of a package's revision, empty if git does not track it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout.strip()

    # A package may be installed inside the checkout of another project.
    tracked = git("ls-files", "--", "__init__.py")
    return git("describe", "--always", "--dirty", "--abbrev=12") if tracked else ""


def _plain(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return ", ".join(value)
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _transcripts(rows: Rows) -> list[dict[str, Any]]:
    scored = [(score_of(row), row) for row in rows if "response" in row]
    scored.sort(key=lambda pair: pair[0])
    shown = [pair for pair in scored if pair[0] < 1][:_MAX_FAILING]
    shown += [pair for pair in scored if pair[0] == 1][: _MAX_TRANSCRIPTS - len(shown)]
    return [_transcript(score, row) for score, row in shown]


def _transcript(score: float, row: Mapping[str, Any]) -> dict[str, Any]:
    columns = {
        "task": "task", "context": "context_length", "frames": "frames",
        "depth": "depth_percent", "seed": "seed",
    }  # fmt: skip
    case = [
        f"{name} {_plain(row[key])}" for name, key in columns.items() if row.get(key) is not None
    ]
    texts = [(name, row.get(name)) for name in ("question", "answer", "response")]
    tone = "right" if score == 1 else "wrong" if score == 0 else "partly"
    return {
        "tone": tone,
        "verdict": f"{tone}, {percent(score)}%" if tone == "partly" else tone,
        "case": ", ".join(case),
        "texts": [(name, _shorten(_plain(text))) for name, text in texts if text is not None],
    }


def _shorten(text: str) -> str:
    if len(text) <= _MAX_RESPONSE:
        return text
    return f"{text[:_MAX_RESPONSE]} … ({len(text) - _MAX_RESPONSE:,} characters more)"
