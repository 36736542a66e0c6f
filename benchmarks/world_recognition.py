"""Name and locate the things in pictures of the generated world, by its renderings alone.

A picture is compared with every rendering of every thing, in every size and place. What explains
it best is what it shows: the sum of squared differences over the window of the rendering falls
most against an empty background.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float, UInt8
from numpy.lib.stride_tricks import sliding_window_view

from lwm.curation.world.drawing import BACKGROUNDS, SIDE, THINGS, Frame, Placed, draw
from lwm.curation.world.scenes import CELL, SIZES

Picture = UInt8[np.ndarray, "64 64 3"]


@dataclass(frozen=True)
class Recognized:
    """Hold a rendering that explains a part of a picture, and the squared error it explains."""

    placed: Placed
    explained: float

    def overlaps(self, other: "Recognized") -> bool:
        """Return whether the windows of two renderings share over a quarter of the smaller."""
        a, b = self.placed, other.placed
        width = min(a.left + a.size, b.left + b.size) - max(a.left, b.left)
        height = min(a.top + a.size, b.top + b.size) - max(a.top, b.top)
        return max(width, 0) * max(height, 0) > min(a.size, b.size) ** 2 / 4


def background(picture: Picture) -> str:
    """Return the background whose color most pixels are near to."""
    colors = np.array(list(BACKGROUNDS.values()), np.float32)
    distance = ((picture[..., None, :].astype(np.float32) - colors) ** 2).sum(-1)
    nearest = np.where(distance.min(-1) < 40**2, distance.argmin(-1), len(colors))
    counts = np.bincount(nearest.ravel(), minlength=len(colors))[: len(colors)]
    return list(BACKGROUNDS)[int(counts.argmax())]


@cache
def _renderings(
    things: tuple[str, ...], size: int, behind: str
) -> Float[np.ndarray, "things pixels"]:
    frames = (Frame(behind, (Placed(thing, size, 0, 0),)) for thing in things)
    return np.stack([draw(f)[:size, :size].ravel() for f in frames]).astype(np.float32)


def candidates(
    picture: Picture, things: tuple[str, ...] = THINGS, sizes: tuple[int, ...] = tuple(SIZES)
) -> list[Recognized]:
    """Return the best thing of each size and place, the best first."""
    behind = background(picture)
    empty = np.array(BACKGROUNDS[behind], np.float32)
    found = []
    # Things may be partly outside, where every pixel agrees with every rendering.
    margin = max(sizes)
    for size in sizes:
        renderings = _renderings(things, size, behind)
        padded = np.pad(
            picture.astype(np.float32), ((margin, margin), (margin, margin), (0, 0)),
            constant_values=np.nan,
        )  # fmt: skip
        windows = sliding_window_view(padded, (size, size, 3))[:, :, 0]
        firsts = np.arange(-size + CELL, SIDE - CELL + 1, CELL)
        parts = windows[np.ix_(firsts + margin, firsts + margin)].reshape(len(firsts) ** 2, -1)
        inside = ~np.isnan(parts)
        parts = np.nan_to_num(parts)
        # |part - empty|^2 - |part - rendering|^2, over the pixels inside the picture
        plain = np.tile(empty, size * size)
        explained = 2 * parts @ (renderings - plain).T
        explained += inside.astype(np.float32) @ (plain**2 - renderings**2).T
        for index, thing in enumerate(explained.argmax(axis=1)):
            top, left = divmod(index, len(firsts))
            placed = Placed(things[thing], size, int(firsts[left]), int(firsts[top]))
            found.append(Recognized(placed, float(explained[index, thing])))
    return sorted(found, key=lambda one: -one.explained)


def things_in(
    picture: Picture,
    count: int,
    things: tuple[str, ...] = THINGS,
    sizes: tuple[int, ...] = tuple(SIZES),
) -> list[Placed]:
    """Return at most `count` things that do not overlap, the clearest first."""
    chosen: list[Recognized] = []
    for one in candidates(picture, things, sizes):
        if len(chosen) == count or one.explained <= 0:
            break
        if not any(one.overlaps(other) for other in chosen):
            chosen.append(one)
    return [one.placed for one in chosen]
