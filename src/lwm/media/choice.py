"""Choose the frames of a video to use, from the times at which they appear."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lwm.core.errors import InputError

_MAX_FRAMES = 1 << 24  # at a rate; a broken file may declare any duration


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Hold when each frame of a video appears and when the last one ends, in seconds."""

    times: Sequence[float]
    end: float

    def __post_init__(self) -> None:
        assert len(self.times) > 0
        assert self.end >= self.times[-1], (self.end, self.times[-1])


def check_choice(max_frames: int | None, fps: float | None) -> None:
    """Raise InputError if an argument of `choose_frames` is out of range."""
    if max_frames is not None and max_frames < 1:
        raise InputError(f"max_frames is {max_frames}; it must be at least 1")
    if fps is not None and not (math.isfinite(fps) and 0 < fps <= 1000):
        raise InputError(f"fps is {fps}; it must lie above 0 and be at most 1000")


def choose_frames(
    timeline: Timeline, *, max_frames: int | None = None, fps: float | None = None
) -> Sequence[int]:
    """Return the indices of the frames to use, in ascending order.

    Args:
        max_frames: maximum number of frames, spaced evenly from first to last as in the original;
            None sets no limit.
        fps: take the frame that is visible at each time k / fps after the first frame, so one
            frame may come several times; None takes every frame once.
    """
    if fps is None:
        return _spaced_evenly(len(timeline.times), max_frames)
    start = timeline.times[0]
    # Containers round times to a millisecond at worst. A time slightly before a frame means that
    # frame; otherwise sampling at the video's rate would skip some frames and repeat others.
    tolerance = 1e-3
    count = max(1, math.ceil((timeline.end - start - tolerance) * fps))
    if count > _MAX_FRAMES:
        raise InputError(
            f"the video declares a length of {timeline.end - start:.0f} seconds, which at {fps} "
            f"frames a second are {count} frames; up to {_MAX_FRAMES} are taken, so lower fps"
        )
    steps = _spaced_evenly(count, max_frames)
    return [bisect.bisect_right(timeline.times, start + k / fps + tolerance) - 1 for k in steps]


def _spaced_evenly(count: int, limit: int | None) -> Sequence[int]:
    if limit is None or count <= limit:
        return range(count)
    return np.linspace(0, count - 1, limit).astype(int).tolist()
