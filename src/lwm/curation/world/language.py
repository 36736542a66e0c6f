"""Say what a scene shows: captions, and questions with their answers, in many phrasings."""

from collections.abc import Callable, Mapping
from random import Random
from typing import NamedTuple

from lwm.curation.world.scenes import Scene


class Question(NamedTuple):
    """Hold a question about a scene, its answer, and the kind of question."""

    kind: str
    text: str
    answer: str


def with_article(name: str) -> str:
    """Return a name with its indefinite article; plural names have none."""
    if name in ("grapes", "cherries", "glasses"):
        return name
    return f"{'an' if name[0] in 'aeiou' and name != 'unicorn' else 'a'} {name}"


def place_words(row: str, column: str) -> str:
    """Return where a thing is, such as `at the top left`."""
    if not row and not column:
        return "in the middle"
    if not row:
        return f"on the {column}"
    return f"at the {row} {column}".rstrip()


def caption(scene: Scene, random: Random) -> str:
    """Return a caption with all facts of a scene in one of several phrasings."""
    if scene.parts:
        return ", then ".join(caption(part, random) for part in scene.parts)
    facts = scene.facts
    what = _CAPTIONS[scene.kind](facts, random)
    background = facts["background"]
    ending = random.choice(
        (
            f" on {with_article(background)} background",
            f" on {background}",
            f", the background is {background}",
        )
    )
    return what + ending


def partial_caption(scene: Scene, random: Random) -> str:
    """Return a caption that leaves some facts open."""
    if scene.parts:
        return ", then ".join(map(_things, scene.parts))
    facts = scene.facts
    if scene.kind != "still" or random.random() < 0.3:
        return _things(scene)
    sized = with_article(f"{facts['size']} {facts['thing']}".strip())
    where, background = place_words(facts["row"], facts["column"]), facts["background"]
    thing = with_article(facts["thing"])
    return random.choice((sized, f"{thing} {where}", f"{thing} on {background}"))


def _things(scene: Scene) -> str:
    named = [scene.facts[key] for key in ("thing", "first", "second") if key in scene.facts]
    return " and ".join(map(with_article, named))


def questions(scene: Scene) -> list[Question]:
    """Return every question that a scene answers, each in its first phrasing."""
    return [Question(kind, _PHRASINGS[kind][0], answer) for kind, answer in _answers(scene)]


def random_question(scene: Scene, random: Random) -> Question:
    """Return one of the questions that a scene answers, in one of its phrasings."""
    kind, answer = random.choice(_answers(scene))
    return Question(kind, random.choice(_PHRASINGS[kind]), answer)


def _still(facts: Mapping[str, str], random: Random) -> str:
    sized = with_article(f"{facts['size']} {facts['thing']}".strip())
    where = place_words(facts["row"], facts["column"])
    return random.choice((f"{sized} {where}", f"a picture of {sized} {where}"))


def _pair(facts: Mapping[str, str], random: Random) -> str:
    first, second = with_article(facts["first"]), with_article(facts["second"])
    if facts["relation"] == "beside":
        return random.choice(
            (
                f"{first} on the left and {second} on the right",
                f"{first} to the left of {second}",
                f"{second} to the right of {first}",
            )
        )
    return random.choice(
        (
            f"{first} at the top and {second} at the bottom",
            f"{first} above {second}",
            f"{second} below {first}",
        )
    )


def _move(facts: Mapping[str, str], random: Random) -> str:
    thing, way, speed = with_article(facts["thing"]), facts["way"], facts["speed"]
    to = f"to the {way}" if way in ("left", "right") else way
    return random.choice(
        (
            f"{thing} moving {way} {speed}",
            f"{thing} moving {speed} {to}",
            f"{thing} that moves {way} {speed}",
        )
    )


def _resize(facts: Mapping[str, str], random: Random) -> str:
    thing, change = with_article(facts["thing"]), facts["change"]
    doing = {"grows": "growing", "shrinks": "shrinking"}[change]
    return random.choice((f"{thing} {doing}", f"{thing} that {change}"))


def _appear(facts: Mapping[str, str], random: Random) -> str:
    thing, where = with_article(facts["thing"]), place_words(facts["row"], facts["column"])
    return random.choice((f"{thing} appearing {where}", f"{thing} that appears {where}"))


def _leave(facts: Mapping[str, str], random: Random) -> str:
    thing, side = with_article(facts["thing"]), facts["side"]
    return random.choice((f"{thing} leaving to the {side}", f"{thing} that leaves to the {side}"))


def _fall(facts: Mapping[str, str], random: Random) -> str:
    thing = with_article(facts["thing"])
    return random.choice((f"{thing} falling and bouncing", f"{thing} that falls and bounces"))


def _roll(facts: Mapping[str, str], random: Random) -> str:
    thing, way = with_article(facts["thing"]), facts["way"]
    return random.choice(
        (f"{thing} rolling {way} and stopping", f"{thing} that rolls {way} and stops")
    )


def _meet(facts: Mapping[str, str], random: Random) -> str:
    first, second = with_article(facts["first"]), with_article(facts["second"])
    return random.choice(
        (
            f"{first} and {second} meeting and bouncing apart",
            f"{first} and {second} that meet and bounce apart",
        )
    )


def _pass_behind(facts: Mapping[str, str], random: Random) -> str:
    first, second, way = with_article(facts["first"]), facts["second"], facts["way"]
    second = with_article(second)
    return random.choice(
        (f"{first} passing behind {second} to the {way}", f"{first} moving {way} behind {second}")
    )


_CAPTIONS: Mapping[str, Callable[[Mapping[str, str], Random], str]] = {
    "still": _still,
    "pair": _pair,
    "move": _move,
    "resize": _resize,
    "appear": _appear,
    "leave": _leave,
    "fall": _fall,
    "roll": _roll,
    "meet": _meet,
    "pass": _pass_behind,
}

_PHRASINGS = {
    "what": ("What is it?", "What is this?", "What do you see?"),
    "where": ("Where is it?", "Where is the thing?", "In which place is it?"),
    "background": (
        "What color is the background?",
        "Which color is the background?",
        "What is the color behind it?",
    ),
    "count": ("How many things are there?", "How many things do you see?"),
    "size": ("How big is it?", "Is it small, medium or large?"),
    "left": ("What is on the left?", "Which thing is on the left?"),
    "right": ("What is on the right?", "Which thing is on the right?"),
    "top": ("What is at the top?", "Which thing is above?"),
    "bottom": ("What is at the bottom?", "Which thing is below?"),
    "bigger": ("Which is bigger?", "Which thing is bigger?"),
    "way": ("Which way does it move?", "Where does it move?", "In which direction does it go?"),
    "speed": ("How fast does it move?", "Does it move slowly or quickly?"),
    "happens": ("What happens?", "What happens in the video?", "What does it do?"),
    "end": ("What happens at the end?", "How does it end?"),
    "first": ("What comes first?", "What happens first?"),
    "begins": ("What do you see at the beginning?", "What comes at the beginning?"),
    "closes": ("What do you see at the end?", "What comes at the end?"),
    "background before": (
        "What color is the background at the beginning?",
        "Which color is the background at the beginning?",
    ),
    "background after": (
        "What color is the background at the end?",
        "Which color is the background at the end?",
    ),
    "behind": ("What passes behind?", "Which thing passes behind?"),
}


def _answers(scene: Scene) -> list[tuple[str, str]]:
    """Return the kinds of questions about a scene, with their answers."""
    if scene.parts:
        first, last = scene.parts
        return [
            ("begins", _things(first)),
            ("closes", _things(last)),
            ("background before", first.facts["background"]),
            ("background after", last.facts["background"]),
        ]
    facts = scene.facts
    answers = [("background", facts["background"])]
    if "thing" in facts:
        answers += [("what", with_article(facts["thing"])), ("count", "one")]
    else:
        answers.append(("count", "two"))
    match scene.kind:
        case "still":
            answers.append(("where", place_words(facts["row"], facts["column"])))
            answers.append(("size", facts["size"] or "medium"))
        case "pair":
            sides = ("left", "right") if facts["relation"] == "beside" else ("top", "bottom")
            answers.append((sides[0], with_article(facts["first"])))
            answers.append((sides[1], with_article(facts["second"])))
            if facts["bigger"]:
                answers.append(("bigger", f"the {facts['bigger']}"))
        case "move":
            answers += [("way", facts["way"]), ("speed", facts["speed"])]
        case "resize":
            answers.append(("happens", f"it {facts['change']}"))
        case "appear":
            answers += [("happens", "it appears"), ("first", "the background is empty")]
            answers.append(("where", place_words(facts["row"], facts["column"])))
        case "leave":
            answers += [("way", facts["side"]), ("end", "it leaves")]
        case "fall":
            answers += [("happens", "it falls and bounces"), ("first", "it falls")]
        case "roll":
            answers += [("way", facts["way"]), ("end", "it stops")]
        case "meet":
            answers += [("end", "they bounce apart"), ("first", "they meet")]
            answers.append(("left", with_article(facts["first"])))
            answers.append(("right", with_article(facts["second"])))
        case "pass":
            answers += [("way", facts["way"]), ("behind", with_article(facts["first"]))]
    return answers
