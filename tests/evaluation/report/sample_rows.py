"""Provide rows of results with scores that are easy to compute by hand."""

from typing import Any


def needle(length: int, depth: float, correct: bool, seed: int = 0, **more: Any) -> dict[str, Any]:
    """Make a row with the columns of the original LWM scripts."""
    return {
        "context_length": length, "depth_percent": depth, "response": f"It is {seed}.",
        "answer": "7421936", "correct": correct, "seed": seed, **more,
    }  # fmt: skip


def suite(task: str, length: int, score: float, seed: int = 0) -> dict[str, Any]:
    return {
        "task": task, "context_length": length, "seed": seed, "score": score, "response": "?",
        "answer": ["a"], "correct": score == 1,
    }  # fmt: skip


FOUR = [
    needle(1024, 0.0, True), needle(1024, 0.0, False, 1),
    needle(1024, 50.0, True), needle(1024, 50.0, True, 1),
    needle(4096, 0.0, False), needle(4096, 0.0, False, 1),
]  # fmt: skip
"""Two lengths, two depths, two rounds; the longer one's deeper cell is missing."""

SEVERAL = [
    {
        "context_length": 2048, "seed": 0, "response": "1 and 2", "answer": ["1", "3"],
        "depth_percent": [10.0, 90.0], "correct": [True, False], "score": 0.5,
    }
]  # fmt: skip
