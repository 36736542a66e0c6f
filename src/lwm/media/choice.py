"""Which frames of a video are taken, by their times alone. Knows no files and no pixels."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lwm.core.errors import InputError

_MOST = 1 << 24  # frames taken at a rate; a broken file may claim to last for ages


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """When each frame of a video appears, and when the last one ends; seconds, ascending."""

    times: Sequence[float]
    end: float

    def __post_init__(self) -> None:
        assert len(self.times) > 0
        assert self.end >= self.times[-1], (self.end, self.times[-1])


def check_choice(max_frames: int | None, fps: float | None) -> None:
    """Raises:
    InputError: one of them is out of range.
    """
    if max_frames is not None and max_frames < 1:
        raise InputError(f"max_frames is {max_frames}; it must be at least 1")
    if fps is not None and not (math.isfinite(fps) and 0 < fps <= 1000):
        raise InputError(f"fps is {fps}; it must lie above 0 and be at most 1000")


def choose_frames(
    timeline: Timeline, *, max_frames: int | None = None, fps: float | None = None
) -> Sequence[int]:
    """Indices of the frames to take, ascending.

    At `fps`, one frame for every moment k / fps after the first frame and before the end: the one
    that is on the screen then, so one may come several times. Without, every frame once. Of what
    that gives, no more than `max_frames` in even steps, as the original draws them.

    Raises:
        InputError: the rate gives more frames than anyone could want.
    """
    taken: Sequence[int] = range(len(timeline.times))
    if fps is not None:
        start = timeline.times[0]
        # Containers round times to a millisecond at worst: a moment a hair before a frame means
        # that frame, or the video's own rate would skip frames and show others twice.
        hair = 1e-3
        count = max(1, math.ceil((timeline.end - start - hair) * fps))
        if count > _MOST:
            raise InputError(
                f"the video says it lasts {timeline.end - start:.0f} seconds, which at {fps} "
                f"frames a second are {count} frames; up to {_MOST} are taken, so lower fps"
            )
        if max_frames is None or count <= max_frames:
            moments: Sequence[int] = range(count)
        else:
            moments = _even(count, max_frames)
        return [bisect.bisect_right(timeline.times, start + k / fps + hair) - 1 for k in moments]
    if max_frames is not None and len(taken) > max_frames:
        taken = _even(len(taken), max_frames)
    return taken


def _even(count: int, wanted: int) -> list[int]:
    return np.linspace(0, count - 1, wanted).astype(int).tolist()
