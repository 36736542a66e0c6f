"""Score a model of the generated world on combinations that its training data never has.

Things, places and motions in what a model draws are recognized by renderings of the world alone
(`world_recognition.py`), which is scored first, on held-out renderings. Each score is printed with
a 95% interval (Wilson 1927).

usage: python benchmarks/world.py MODEL [--cases 200] [--parts renderings pictures images ...]
"""

import argparse
import collections
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import jax.numpy as jnp
import numpy as np
from world_recognition import background, things_in

import lwm
from lwm.curation.world.drawing import SIDE, THINGS, UNSEEN_THINGS, Frame, Placed, draw
from lwm.curation.world.language import caption, questions
from lwm.curation.world.scenes import FRAMES, SIZES, Sampler, Scene
from lwm.media.images import to_pixels, to_unit
from lwm.models.likeness import psnr, ssim

SETTINGS = {"temperature": float, "top_k": int, "min_p": float, "guidance": float}
SHOWN = 3  # frames from which an event is predicted


class Scores:
    """Count what is right, by name."""

    def __init__(self) -> None:
        self.right: dict[str, int] = collections.defaultdict(int)
        self.cases: dict[str, int] = collections.defaultdict(int)

    def add(self, name: str, right: bool) -> None:
        self.right[name] += bool(right)
        self.cases[name] += 1

    def rows(self) -> Iterator[tuple[str, float, float, float, int]]:
        for name, count in self.cases.items():
            yield name, *interval(self.right[name], count), count


def interval(right: int, count: int) -> tuple[float, float, float]:
    """Return a share and its 95% interval."""
    z, share = 1.96, right / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return share, middle - half, middle + half


def third(first: int, size: int) -> int:
    """Return in which third of the picture a thing lies, by its nearest center."""
    centers = (size / 2, SIDE / 2, SIDE - size / 2)
    return min(range(3), key=lambda index: abs(first + size / 2 - centers[index]))


def center(placed: Placed) -> np.ndarray:
    return np.array([placed.left + placed.size / 2, placed.top + placed.size / 2])


def score_still(scores: Scores, wanted: Frame, picture: np.ndarray) -> None:
    (thing,) = wanted.things
    recognized = things_in(picture, 1)
    best = recognized[0] if recognized else None
    scores.add("thing", best is not None and best.thing == thing.thing)
    scores.add("background", background(picture) == wanted.background)
    place = third(thing.top, thing.size), third(thing.left, thing.size)
    scores.add(
        "place",
        best is not None and (third(best.top, best.size), third(best.left, best.size)) == place,
    )
    scores.add("size", best is not None and best.size == thing.size)


def score_pair(scores: Scores, wanted: Frame, picture: np.ndarray) -> None:
    recognized = sorted(things_in(picture, 2), key=lambda one: one.left + one.top)
    names = [one.thing for one in recognized]
    scores.add("two things", sorted(names) == sorted(one.thing for one in wanted.things))
    scores.add("two things in their places", names == [one.thing for one in wanted.things])


def track(frames: np.ndarray, thing: str, sizes: tuple[int, ...]) -> list[Placed | None]:
    """Return where a thing is in each frame; None where it is not."""
    found = (things_in(frame, 1, (thing,), sizes) for frame in frames)
    return [one[0] if one else None for one in found]


def score_motion(scores: Scores, scene: Scene, video: np.ndarray) -> None:
    """Score the first frame that shows the thing, and what the thing does."""
    thing = scene.facts["thing"]
    shown = next((t for t, frame in enumerate(scene.frames) if frame.things), 0)
    first = things_in(video[shown], 1)
    scores.add("thing in its first frame", bool(first) and first[0].thing == thing)
    places = track(video, thing, tuple(SIZES) if scene.kind == "resize" else (24, 32))
    present = [place is not None for place in places]
    right = False
    match scene.kind:
        case "move":
            if present[0] and present[-1]:
                shift = center(places[-1]) - center(places[0])  # type: ignore[arg-type]
                ways = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
                along = shift @ np.array(ways[scene.facts["way"]])
                right = bool(along >= 8 and abs(shift).sum() < 1.5 * along)
        case "resize":
            if present[0] and present[-1]:
                change = places[-1].size - places[0].size  # type: ignore[union-attr]
                right = change > 0 if scene.facts["change"] == "grows" else change < 0
        case "appear":
            right = not present[0] and present[-1]
        case _:
            right = present[0] and not present[-1]
    scores.add("motion", right)
    scores.add(f"motion: {scene.kind}", right)


def renderings(cases: int) -> Scores:
    """Score the recognizer itself."""
    scores, sampler = Scores(), Sampler(Random("renderings"), held_out=True)
    for _ in range(cases):
        frame = sampler.still().frames[0]
        score_still(scores, frame, draw(frame))
        frame = sampler.pair().frames[0]
        score_pair(scores, frame, draw(frame))
        scene = sampler.video()
        score_motion(scores, scene, np.stack([draw(frame) for frame in scene.frames]))
    return scores


def pictures(model: lwm.Model, cases: int) -> Scores:
    """Score reconstructions, and print how near they are and how many codes they use."""
    scores, sampler = Scores(), Sampler(Random("pictures"), held_out=True)
    frames = [make().frames[0] for _ in range(cases) for make in (sampler.still, sampler.pair)]
    original = np.stack([draw(frame) for frame in frames])
    codes = model.codec.encode(to_unit(original))
    decoded = model.codec.decode(codes)
    for frame, picture in zip(frames, to_pixels(decoded), strict=True):
        (score_still if len(frame.things) == 1 else score_pair)(scores, frame, picture)
    unseen = Sampler(sampler.random, held_out=True, things=UNSEEN_THINGS)
    for _ in range(cases):
        frame = unseen.still().frames[0]
        (pixels,) = model.codec.decode(model.codec.encode(to_unit(draw(frame)[None])))
        (best,) = things_in(to_pixels(pixels), 1, THINGS + UNSEEN_THINGS) or [None]
        right = best is not None and best.thing == frame.things[0].thing
        scores.add("thing that training never shows", right)
    size = model.codec.config.codebook_size
    print(
        f"PSNR {float(psnr(jnp.asarray(to_unit(original)), decoded).mean()):.2f} dB, "
        f"SSIM {float(ssim(jnp.asarray(to_unit(original)), decoded).mean()):.3f}, "
        f"{len(np.unique(codes)) / size:.1%} of {size:,} codes used"
    )
    return scores


def images(model: lwm.Model, cases: int, settings: dict[str, Any]) -> Scores:
    """Score drawings of captions."""
    scores, random = Scores(), Random("images")
    sampler = Sampler(random, held_out=True)
    for number in range(cases):
        for make, score in ((sampler.still, score_still), (sampler.pair, score_pair)):
            scene = make()
            picture = model.image(caption(scene, random), seed=number, **settings)
            score(scores, scene.frames[0], picture)
    return scores


def videos(model: lwm.Model, cases: int, settings: dict[str, Any]) -> Scores:
    """Score videos of captions."""
    scores, random = Scores(), Random("videos")
    sampler = Sampler(random, held_out=True)
    for number in range(cases):
        scene = sampler.video()
        video = model.video(caption(scene, random), frames=FRAMES, seed=number, **settings)
        score_motion(scores, scene, video)
    return scores


def physics(model: lwm.Model, cases: int, settings: dict[str, Any]) -> Scores:
    """Print the mean error of the center in the last frame, beside two baselines."""
    random = Random("physics")
    sampler = Sampler(random, held_out=True)
    errors: dict[str, list[float]] = collections.defaultdict(list)
    kinds: dict[str, list[float]] = collections.defaultdict(list)
    for number in range(cases):
        scene = sampler.physics()
        shown = np.stack([draw(frame) for frame in scene.frames[:SHOWN]])
        before = model.codec.encode(to_unit(shown)).reshape(1, SHOWN, -1)
        video = model.video(
            caption(scene, random), frames=FRAMES, before=before, seed=number, **settings
        )
        path = [center(frame.things[0]) for frame in scene.frames]
        thing = scene.frames[0].things[0]
        (last,) = things_in(video[-1], 1, (thing.thing,), (thing.size,)) or [None]
        drawn = center(last) if last else path[SHOWN - 1]
        guesses = {
            "model": drawn,
            "stays where it was": path[SHOWN - 1],
            "keeps its speed": path[SHOWN - 1]
            + (path[SHOWN - 1] - path[0]) / (SHOWN - 1) * (FRAMES - SHOWN),
        }
        for name, guess in guesses.items():
            errors[name].append(float(np.linalg.norm(guess - path[-1])))
        kinds[scene.kind].append(errors["model"][-1])
    for name, values in [*errors.items(), *kinds.items()]:
        half = 1.96 * float(np.std(values)) / math.sqrt(len(values))
        print(f"mean error, {name}: {statistics.mean(values):.1f} +- {half:.1f} pixels")
    return Scores()


def answers(model: lwm.Model, cases: int, maker: str) -> Scores:
    """Score answers to every question about a scene."""
    scores, sampler = Scores(), Sampler(Random(f"answers {maker}"), held_out=True)
    for number in range(cases):
        if maker == "images":
            scene = sampler.pair() if number % 3 == 0 else sampler.still()
        else:
            scene = sampler.physics() if number % 3 == 0 else sampler.video()
        pixels = to_unit(np.stack([draw(frame) for frame in scene.frames]))
        part = {"type": "codes", "codes": model.codec.encode(pixels).reshape(len(pixels), -1)}
        for asked in questions(scene):
            content = [part, {"type": "text", "text": asked.text}]
            answer = model.chat(
                [{"role": "user", "content": content}], max_tokens=24, temperature=0.0
            )
            right = answer.strip() == asked.answer  # type: ignore[union-attr]
            scores.add("all questions", right)
            scores.add(f"question: {asked.kind}", right)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("model")
    parser.add_argument("--cases", type=int, default=200)
    for name, kind in SETTINGS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, help="defaults to the model's")
    parser.add_argument("--out", type=Path, help="also write the scores to this JSON file")
    parts: dict[str, Callable[[lwm.Model, int, dict[str, Any]], Scores]] = {
        "renderings": lambda model, cases, settings: renderings(cases),
        "pictures": lambda model, cases, settings: pictures(model, cases),
        "images": images,
        "videos": videos,
        "physics": physics,
        "image-questions": lambda model, cases, settings: answers(model, cases, "images"),
        "video-questions": lambda model, cases, settings: answers(model, cases, "videos"),
    }
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    arguments = parser.parse_args()
    model = lwm.load(arguments.model)
    chosen = {name: getattr(arguments, name) for name in SETTINGS}
    settings: dict[str, Any] = {name: v for name, v in chosen.items() if v is not None}
    results = {}
    for part in arguments.parts:
        start = time.perf_counter()
        scores = parts[part](model, arguments.cases, settings)
        print(f"{part}: {time.perf_counter() - start:.0f} s")
        results[part] = list(scores.rows())
        for name, share, low, high, count in results[part]:
            print(f"  {name}: {share:.1%} ({low:.1%} to {high:.1%}) of {count}")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
