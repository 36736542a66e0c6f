"""What the figures of a step and of an evaluation say: rows for `metrics.jsonl`, notes for people.

The loop asks; a kind of training answers. Text is read here, pictures beside them.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lwm.training.step import by_kind


@dataclass
class Tally:
    """What is counted over the whole run; travels in the checkpoints' facts."""

    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best: float | None = None

    def is_best(self, loss: float) -> bool:
        """Whether an evaluation loss is the lowest so far; notes it."""
        if not math.isfinite(loss) or (self.best is not None and loss >= self.best):
            return False
        self.best = loss
        return True


class Reading(Protocol):
    """Turns numbers of one kind of training into rows and notes."""

    def step(self, found: Any, seconds: float, tally: Tally) -> dict[str, Any]:
        """Figures of a step that took so long, `loss` among them; counts what it saw."""
        ...

    def note(self, row: dict[str, Any]) -> str: ...

    def evaluation(self, totals: Any) -> dict[str, float]:
        """Figures of an evaluation, `loss` among them, from the sums over its batches."""
        ...

    def evaluation_note(self, figures: dict[str, float]) -> str: ...


@dataclass(frozen=True, kw_only=True)
class TextReading:
    """Reads `StepMetrics` and `LossSums`.

    Args:
        step_flops: floating-point operations of a step of the model, recomputation left out.
        peak_flops: operations a second that all devices together can do, or 0 if unknown.
    """

    step_flops: float
    peak_flops: float

    def step(self, found: Any, seconds: float, tally: Tally) -> dict[str, Any]:
        tokens = int(found.tokens)
        tally.tokens += tokens
        flops = self.step_flops / seconds
        return {
            "loss": float(found.loss),
            "accuracy": float(found.accuracy),
            "perplexity": _exp(float(found.nll)),
            "gradient_norm": float(found.gradient_norm),
            "weight_norm": float(found.weight_norm),
            "tokens": tally.tokens,
            "targets": int(found.targets),
            **kinds({"text": found.text, "vision": found.vision}),
            "tokens_per_second": tokens / seconds,
            "flops_utilisation": flops / self.peak_flops if self.peak_flops else None,
        }

    def note(self, row: dict[str, Any]) -> str:
        return f"loss {row['loss']:.4f}, {row['tokens_per_second']:,.0f} tokens/s"

    def evaluation(self, totals: Any) -> dict[str, float]:
        targets = max(float(totals.targets), 1.0)
        return {
            "loss": float(totals.loss) / max(float(totals.weight), 1e-8),
            "perplexity": _exp(float(totals.nll) / targets),
            "accuracy": float(totals.correct) / targets,
            **kinds(by_kind(totals)),
        }

    def evaluation_note(self, figures: dict[str, float]) -> str:
        return f"held-out loss {figures['loss']:.4f}, perplexity {figures['perplexity']:.2f}"


@dataclass(frozen=True, kw_only=True)
class VqganReading:
    """Reads `VqganMetrics` and `VqganSums`.

    Args:
        pictures: of a step.
    """

    pictures: int

    def step(self, found: Any, seconds: float, tally: Tally) -> dict[str, Any]:
        figures = {name: float(x) for name, x in vars(found).items() if name != "skipped"}
        return {**figures, "pictures_per_second": self.pictures / seconds}

    def note(self, row: dict[str, Any]) -> str:
        return (
            f"loss {row['loss']:.4f}, PSNR {row['psnr']:.2f} dB, {row['used']:,.0f} entries used, "
            f"{row['pictures_per_second']:,.1f} pictures/s"
        )

    def evaluation(self, totals: Any) -> dict[str, float]:
        pictures, counts = max(float(totals.pictures), 1.0), np.asarray(totals.counts)
        shares = counts[counts > 0] / max(counts.sum(), 1.0)
        return {
            "loss": float(totals.loss) / pictures,
            "psnr": float(totals.psnr) / pictures,
            "ssim": float(totals.ssim) / pictures,
            "used": int((counts > 0).sum()),
            "perplexity": float(np.exp(-(shares * np.log(shares)).sum())),
        }

    def evaluation_note(self, figures: dict[str, float]) -> str:
        return (
            f"held-out PSNR {figures['psnr']:.2f} dB, SSIM {figures['ssim']:.3f}, "
            f"{figures['used']:,} entries used, perplexity {figures['perplexity']:,.0f}"
        )


def kinds(found: dict[str, Any]) -> dict[str, float]:
    """`text_loss`, `vision_accuracy` and the like; nothing of a model of text alone."""
    return {
        f"{kind}_{name}": int(value) if name == "targets" else float(value)
        for kind, figures in found.items()
        if figures is not None
        for name, value in vars(figures).items()
    }


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
