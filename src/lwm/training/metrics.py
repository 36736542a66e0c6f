"""Where figures of a run go: JSON lines always, TensorBoard and W&B if asked, a picture at the
end.

Knows rows of figures; knows nothing of how they came about.
"""

import importlib.util
import json
import math
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lwm.core.errors import ConfigError

FILE, CURVE = "metrics.jsonl", "loss.png"


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Who is told of a run's figures besides `metrics.jsonl`."""

    tensorboard: bool = False
    """Write event files for TensorBoard under the run directory."""
    wandb: str = ""
    """Project of Weights & Biases to log to; none unless named."""
    wandb_mode: Literal["online", "offline"] = "online"
    """Offline runs are kept under the run directory, for `wandb sync`."""


class Metrics:
    """The figures of one run, one JSON object a line.

    Args:
        after: rows of later steps are dropped: a resumed run writes them again.
        settings: of the run, for W&B.
    """

    def __init__(
        self, run: Path, tracking: TrackingConfig, *, after: int, settings: dict[str, Any]
    ) -> None:
        self._path = run / FILE
        self._boards: list[Any] = []
        if tracking.tensorboard:
            self._boards.append(_TensorBoard(run / "tensorboard", after))
        if tracking.wandb:
            self._boards.append(_WeightsAndBiases(run, tracking, settings))
        kept = [row for row in read_metrics(self._path) if row["step"] <= after]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        partial.rename(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Args:
        row: `step`, `split` and figures; one that is not finite is written as null.
        """
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        self._file.write(json.dumps(plain) + "\n")
        self._file.flush()
        for board in self._boards:
            board.write(plain)

    def close(self) -> None:
        self._file.close()
        for board in self._boards:
            board.close()

    def draw(self) -> Path | None:
        """The loss curve as a PNG beside the figures; None while there is nothing to draw."""
        rows = read_metrics(self._path)
        return draw_curve(rows, self._path.with_name(CURVE)) if rows else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a file of figures; a last line that a crash cut short is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def draw_curve(rows: list[dict[str, Any]], path: Path) -> Path:
    """Training loss of each step, its running mean, and evaluation loss, by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    train = [(r["step"], r["loss"]) for r in rows if r["split"] == "train" and r["loss"]]
    held = [(r["step"], r["loss"]) for r in rows if r["split"] == "evaluation" and r["loss"]]
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#9bb8d3", linewidth=0.8, label="training, each step")
        means, mean = [], losses[0]
        for loss in losses:
            mean += (loss - mean) * 0.05
            means.append(mean)
        axes.plot(steps, means, color="#1f4e79", linewidth=1.6, label="training, running mean")
    if held:
        axes.plot(*zip(*held, strict=True), "o-", color="#c55a11", markersize=4, label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    if train or held:
        axes.legend()
    figure.savefig(path, dpi=120)
    return path


def require_tracking(tracking: TrackingConfig) -> None:
    """Refuses tracking by packages that are not installed.

    Raises:
        ConfigError: names the first.
    """
    for wanted, package in ((tracking.tensorboard, "tensorboardX"), (tracking.wandb, "wandb")):
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"tracking is to use {package}, which is not installed; install lwm[track]"
            )


class _TensorBoard:
    def __init__(self, directory: Path, after: int) -> None:
        from tensorboardX import SummaryWriter

        # What an interrupted run wrote beyond the checkpoint is hidden, not doubled.
        self._writer = SummaryWriter(str(directory), purge_step=after + 1)

    def write(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(f"{row['split']}/{name}", value, row["step"])

    def close(self) -> None:
        self._writer.close()


def _identity(file: Path) -> str:
    """What W&B knows the run by; kept, so that a resumed run goes on where it was."""
    if not file.is_file():
        file.write_text(secrets.token_hex(4), encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


class _WeightsAndBiases:
    def __init__(self, run: Path, tracking: TrackingConfig, settings: dict[str, Any]) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=tracking.wandb,
                mode=tracking.wandb_mode,
                dir=str(run),
                name=run.name,
                id=_identity(run / "wandb-run-id"),
                resume="allow",
                config=settings,
            )
        except wandb.Error as error:
            raise ConfigError(
                f"Weights & Biases cannot be reached ({' '.join(str(error).split())[:200]}); log "
                "in first, or add --tracking.wandb-mode offline"
            ) from error

    def write(self, row: dict[str, Any]) -> None:
        figures = {
            f"{row['split']}/{name}": value
            for name, value in row.items()
            if isinstance(value, int | float) and name != "step"
        }
        self._run.log(figures, step=row["step"])

    def close(self) -> None:
        self._run.finish()
