"""Compose scenes: what a picture or a video shows, frame by frame, and the facts about it.

Things rest and move on a grid of 8 pixels, the squares that a code covers: so a thing has the same
codes wherever it is, and a video is made of what images show. Scenes whose key facts hash into the
held-out share never occur in training data: new combinations of things, backgrounds and motions,
and whole starting conditions of physics.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from lwm.curation.world.drawing import BACKGROUNDS, SIDE, THINGS, Frame, Placed

CELL = 8
"""Pixels of which all places are multiples."""
FRAMES = 8
"""Frames of a video."""

SIZES = {24: "small", 32: "", 40: "large"}
"""Sizes of a single thing in pixels, and the word for each."""
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
"""Words for the places of a single thing, nine in all."""
_HELD_OUT_SHARE = 8  # one in so many


@dataclass(frozen=True)
class Scene:
    """Hold frames and the facts about them.

    Args:
        kind: still, pair, move, resize, appear, leave, or the name of a physical event.
        facts: what captions and questions are about, by name.
        parts: the scenes that a `sequence` consists of.
    """

    kind: str
    frames: tuple[Frame, ...]
    facts: dict[str, str] = field(default_factory=dict)
    parts: tuple["Scene", ...] = ()


def is_held_out(*facts: object) -> bool:
    """Return whether a combination is reserved for evaluation."""
    text = "|".join(map(str, facts))
    return hashlib.sha256(text.encode()).digest()[0] % _HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class Sampler:
    """Draw scenes at random, either from the held-out combinations or from all others.

    Args:
        things: names to choose from.
    """

    random: Random
    held_out: bool = False
    things: tuple[str, ...] = THINGS

    def still(self) -> Scene:
        """Draw one thing in one of nine places and three sizes."""
        return self._until_allowed(self._still)

    def pair(self) -> Scene:
        """Draw two things side by side or one above the other."""
        return self._until_allowed(self._pair)

    def video(self) -> Scene:
        """Draw a thing that moves, changes its size, appears or leaves."""
        makers = (self._move, self._move, self._move, self._resize, self._appear, self._leave)
        return self._until_allowed(self.random.choice(makers))

    def physics(self) -> Scene:
        """Draw an event that follows from its first three frames."""
        makers = (self._fall, self._roll, self._meet, self._pass_behind)
        return self._until_allowed(self.random.choice(makers))

    def clip(self) -> Scene:
        """Draw a video of either kind, with a physical event in two of five."""
        return self.physics() if self.random.random() < 0.4 else self.video()

    def sequence(self) -> Scene:
        """Draw two videos, one after the other, as one of 16 frames."""
        parts = self.clip(), self.clip()
        frames = tuple(frame for part in parts for frame in part.frames)
        return Scene("sequence", frames, parts=parts)

    def _until_allowed(self, make: Callable[[], tuple[Scene, tuple[object, ...]]]) -> Scene:
        while True:
            scene, combination = make()
            if is_held_out(scene.kind, *combination) == self.held_out:
                return scene

    def _still(self) -> tuple[Scene, tuple[object, ...]]:
        thing, background = self._thing(), self._background()
        size = self.random.choice(tuple(SIZES))
        row, column = self._cell()
        placed = Placed(thing, size, _place(column, size), _place(row, size))
        facts = {
            "thing": thing,
            "background": background,
            "size": SIZES[size],
            "row": ROWS[row],
            "column": COLUMNS[column],
        }
        combination = (thing, background, size, row, column)
        return Scene("still", (Frame(background, (placed,)),), facts), combination

    def _pair(self) -> tuple[Scene, tuple[object, ...]]:
        first, second, background = self._thing(), self._thing(), self._background()
        sizes = self.random.choice(((24, 24), (24, 32), (32, 24)))
        relation = self.random.choice(("beside", "above"))
        places = []
        for number, (thing, size) in enumerate(zip((first, second), sizes, strict=True)):
            along, across = _place(2 * number, size), _place(1, size)
            left, top = (along, across) if relation == "beside" else (across, along)
            places.append(Placed(thing, size, left, top))
        bigger = "" if sizes[0] == sizes[1] else (first, second)[sizes[1] > sizes[0]]
        facts = {
            "first": first,
            "second": second,
            "background": background,
            "relation": relation,
            "bigger": bigger if first != second else "",
        }
        scene = Scene("pair", (Frame(background, tuple(places)),), facts)
        return scene, (*sorted((first, second)), background)

    def _move(self) -> tuple[Scene, tuple[object, ...]]:
        thing, background, size = self._thing(), self._background(), 24
        direction = self.random.choice(("left", "right", "up", "down"))
        speed = self.random.choice(("slowly", "quickly"))
        steps = [CELL * _steps(t, 2 if speed == "quickly" else 4) for t in range(FRAMES)]
        start = self._aligned(0, SIDE - size - steps[-1])
        across = self._aligned(0, SIDE - size)
        if direction in ("left", "up"):
            start, steps = start + steps[-1], [-step for step in steps]
        along = [start + step for step in steps]
        horizontal = direction in ("left", "right")
        places = [(x, across) if horizontal else (across, x) for x in along]
        frames = tuple(Frame(background, (Placed(thing, size, *place),)) for place in places)
        facts = {"thing": thing, "background": background, "way": direction, "speed": speed}
        return Scene("move", frames, facts), (thing, background, direction)

    def _resize(self) -> tuple[Scene, tuple[object, ...]]:
        thing, background = self._thing(), self._background()
        sizes = [24, 24, 24, 32, 32, 40, 40, 40]
        change = self.random.choice(("grows", "shrinks"))
        if change == "shrinks":
            sizes.reverse()
        left, top = (self._aligned(CELL, SIDE - 32) for _ in range(2))  # of 24 pixels
        shifts = [(32 - size) // 16 * CELL for size in sizes]  # keep the center within half a cell
        frames = tuple(
            Frame(background, (Placed(thing, size, left + shift, top + shift),))
            for size, shift in zip(sizes, shifts, strict=True)
        )
        facts = {"thing": thing, "background": background, "change": change}
        return Scene("resize", frames, facts), (thing, background, change)

    def _appear(self) -> tuple[Scene, tuple[object, ...]]:
        thing, background = self._thing(), self._background()
        size, row, column = self.random.choice((24, 32)), *self._cell()
        placed = Placed(thing, size, _place(column, size), _place(row, size))
        first = self.random.randrange(2, 6)
        frames = tuple(Frame(background, (placed,) if t >= first else ()) for t in range(FRAMES))
        facts = {
            "thing": thing,
            "background": background,
            "row": ROWS[row],
            "column": COLUMNS[column],
        }
        return Scene("appear", frames, facts), (thing, background, row, column)

    def _leave(self) -> tuple[Scene, tuple[object, ...]]:
        thing, background, size = self._thing(), self._background(), 24
        side = self.random.choice(("left", "right"))
        start, top = self._aligned(8, 16), self._aligned(0, SIDE - size)
        lefts = [start + CELL * t for t in range(FRAMES)]
        if side == "left":
            lefts = [SIDE - size - left for left in lefts]
        frames = tuple(Frame(background, (Placed(thing, size, x, top),)) for x in lefts)
        facts = {"thing": thing, "background": background, "side": side}
        return Scene("leave", frames, facts), (thing, background, side)

    def _fall(self) -> tuple[Scene, tuple[object, ...]]:
        thing, background, size = self._thing(), self._background(), 24
        height, left = self._aligned(-8, 16), self._aligned(0, 40)
        drift = self.random.choice((-CELL, 0, CELL))
        tops, floor = _bouncing(height, SIDE - size), SIDE - size
        lefts = [min(max(left + drift * _steps(t, 2), 0), floor) for t in range(FRAMES)]
        frames = tuple(
            Frame(background, (Placed(thing, size, x, y),))
            for x, y in zip(lefts, tops, strict=True)
        )
        facts = {"thing": thing, "background": background}
        return Scene("fall", frames, facts), _start(frames)

    def _roll(self) -> tuple[Scene, tuple[object, ...]]:
        thing, background, size = self._thing(), self._background(), 24
        way = self.random.choice(("left", "right"))
        speed = self.random.choice((4.0, 6.5, 9.0))  # that the first three frames tell apart
        start = self._aligned(-16, 8)
        lefts = [_snap(x) for x in _slowing(start, speed)]
        if way == "left":
            lefts = [SIDE - size - left for left in lefts]
        frames = tuple(Frame(background, (Placed(thing, size, x, SIDE - size),)) for x in lefts)
        facts = {"thing": thing, "background": background, "way": way}
        return Scene("roll", frames, facts), _start(frames)

    def _meet(self) -> tuple[Scene, tuple[object, ...]]:
        first, second, background = self._thing(), self._thing(), self._background()
        size, start = 24, self._aligned(-16, 0)
        top, meeting = self._aligned(0, SIDE - size), SIDE // 2 - size
        ahead = [start + CELL * _steps(t, 2) for t in range(FRAMES)]
        lefts = [min(x, 2 * meeting - x) for x in ahead]
        frames = tuple(
            Frame(
                background,
                (Placed(first, size, x, top), Placed(second, size, SIDE - size - x, top)),
            )
            for x in lefts
        )
        facts = {"first": first, "second": second, "background": background}
        return Scene("meet", frames, facts), _start(frames)

    def _pass_behind(self) -> tuple[Scene, tuple[object, ...]]:
        first, second, background = self._thing(), self._thing(), self._background()
        size, way = 24, self.random.choice(("left", "right"))
        start, top = self._aligned(-16, 0), self._aligned(8, 32)
        front = Placed(second, 32, 16, 16)
        pause = self.random.choice((1, 2))
        lefts = [start + CELL * _steps(t, pause) for t in range(FRAMES)]
        if way == "left":
            lefts = [SIDE - size - left for left in lefts]
        frames = tuple(Frame(background, (Placed(first, size, x, top), front)) for x in lefts)
        facts = {"first": first, "second": second, "background": background, "way": way}
        return Scene("pass", frames, facts), _start(frames)

    def _thing(self) -> str:
        return self.random.choice(self.things)

    def _background(self) -> str:
        return self.random.choice(tuple(BACKGROUNDS))

    def _cell(self) -> tuple[int, int]:
        return self.random.randrange(3), self.random.randrange(3)

    def _aligned(self, least: int, most: int) -> int:
        """Return a multiple of `CELL` from `least` to `most`, both included."""
        return self.random.randrange(-(-least // CELL), most // CELL + 1) * CELL


def _place(index: int, size: int) -> int:
    """Return the first pixel of a thing in the first, middle or last third of a side."""
    return (0, (SIDE - size) // (2 * CELL) * CELL, SIDE - size)[index]


def _start(frames: tuple[Frame, ...]) -> tuple[object, ...]:
    """Return the places in the three frames from which an event is to be predicted."""
    return tuple((p.left, p.top) for frame in frames[:3] for p in frame.things)


def _snap(value: float) -> int:
    return CELL * round(value / CELL)


def _steps(t: int, pause: int) -> int:
    """Return how often a thing has moved by frame `t`, if it moves every `pause` frames."""
    return (t + pause - 1) // pause


def _bouncing(start: int, floor: int) -> list[int]:
    """Return the tops of a thing that falls from rest and bounces at 3/4 of its speed."""
    gravity, substeps = 3.0, 20
    position, speed, tops = float(start), 0.0, []
    for _ in range(FRAMES):
        tops.append(_snap(position))
        for _ in range(substeps):
            speed += gravity / substeps
            position += speed / substeps
            if position > floor:
                position, speed = 2 * floor - position, -0.75 * speed
    return tops


def _slowing(start: int, speed: float) -> list[float]:
    """Return the places of a thing that rolls against friction until it stops."""
    friction = 1.5  # pixels per frame, each frame
    places = []
    for t in range(FRAMES):
        moving = min(t, speed / friction)
        places.append(start + speed * moving - friction * moving**2 / 2)
    return places
