"""Write a run's metrics to JSON lines, TensorBoard and Weights & Biases, and plot the loss."""

import importlib.util
import itertools
import json
import math
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from lwm.core.errors import ConfigError
from lwm.core.files import new_file
from lwm.core.journal import append, read_journal

# Functions that write scalars at a step, and that close the tracker.
_Tracker = tuple[Callable[[int, dict[str, Any]], None], Callable[[], None]]


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Set where metrics go besides `metrics.jsonl`."""

    tensorboard: bool = False
    """Write event files for TensorBoard to the run directory."""
    wandb: str = ""
    """Weights & Biases project to log to; none by default."""
    wandb_mode: Literal["online", "offline"] = "online"
    """Offline runs are stored in the run directory, for `wandb sync`."""


class Metrics:
    """Append the metrics of one run, one JSON object per line.

    Rows of steps `after` the one to resume from are discarded, because they are written again.
    """

    def __init__(
        self, run: Path, tracking: TrackingConfig, *, after: int, settings: dict[str, Any]
    ) -> None:
        self._path = run / "metrics.jsonl"
        self._trackers: list[_Tracker] = []
        if tracking.tensorboard:
            self._trackers.append(_tensorboard(run / "tensorboard", after))
        if tracking.wandb:
            self._trackers.append(_weights_and_biases(run, tracking, settings))
        rows = [row for row in read_metrics(self._path) if row["step"] <= after]
        with new_file(self._path, replace=True) as file:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append a row with `step`, `split` and values; values that are not finite become null."""
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        append(self._path, plain, sync=False)
        scalars = {
            f"{row['split']}/{name}": value
            for name, value in plain.items()
            if isinstance(value, int | float) and name != "step"
        }
        for write, _ in self._trackers:
            write(row["step"], scalars)

    def close(self) -> None:
        """Close the trackers, and plot the losses to `loss.png`."""
        for _, close in self._trackers:
            close()
        with suppress(OSError):  # a full disk must not hide the error that ended the run
            if rows := read_metrics(self._path):
                plot_losses(rows, self._path.with_name("loss.png"))


@dataclass(frozen=True)
class _Columns:
    """Hold the columns of every row."""

    step: int
    split: str
    loss: float | None = None


_check_columns = pydantic.TypeAdapter(_Columns).validate_python


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    return row | vars(_check_columns(row))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all complete rows of a metrics file; an empty list if there is no file."""
    kind = Annotated[dict[str, Any], pydantic.AfterValidator(_checked)]
    return [row for _, row in read_journal(path, kind)]


def plot_losses(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot by step the training loss, its running mean, and the evaluation loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    train, evaluation = (
        [(row["step"], row["loss"]) for row in rows if row["split"] == split and row["loss"]]
        for split in ("train", "evaluation")
    )
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#9bb8d3", linewidth=0.8, label="training, each step")
        means = list(itertools.accumulate(losses, lambda mean, loss: 0.95 * mean + 0.05 * loss))
        axes.plot(steps, means, color="#1f4e79", linewidth=1.6, label="training, running mean")
    if evaluation:
        steps, losses = zip(*evaluation, strict=True)
        axes.plot(steps, losses, "o-", color="#c55a11", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    if train or evaluation:
        axes.legend()
    with new_file(path, replace=True) as partial:
        figure.savefig(partial, dpi=120)


def require_tracking(tracking: TrackingConfig) -> None:
    """Refuse tracking by packages that are not installed."""
    for enabled, package in ((tracking.tensorboard, "tensorboardX"), (tracking.wandb, "wandb")):
        if enabled and importlib.util.find_spec(package) is None:
            raise ConfigError(f"tracking needs {package}, which is missing; install lwm[track]")


def _tensorboard(directory: Path, after: int) -> _Tracker:
    from tensorboardX import SummaryWriter

    # Events that an interrupted run wrote after its last checkpoint are hidden, not doubled.
    writer = SummaryWriter(str(directory), purge_step=after + 1)

    def write(step: int, scalars: dict[str, Any]) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)

    return write, writer.close


def _weights_and_biases(run: Path, tracking: TrackingConfig, settings: dict[str, Any]) -> _Tracker:
    import wandb

    id_file = run / "wandb-run-id"  # a resumed run continues under the same id
    if not id_file.is_file():
        with new_file(id_file) as partial:
            partial.write_text(secrets.token_hex(4), encoding="utf-8")
    try:
        tracked = wandb.init(
            project=tracking.wandb,
            mode=tracking.wandb_mode,
            dir=str(run),
            name=run.name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=settings,
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"Weights & Biases cannot be reached ({reason}); log in, or add --tracking.wandb-mode "
            "offline"
        ) from error
    return lambda step, scalars: tracked.log(scalars, step=step), tracked.finish
