"""Check captions, questions and texts against the scenes and documents that they are about."""

import json
import re
from random import Random

import pytest

from lwm.core.errors import InputError
from lwm.curation.world.drawing import THINGS
from lwm.curation.world.language import (
    caption,
    partial_caption,
    place_words,
    questions,
    random_question,
    with_article,
)
from lwm.curation.world.scenes import Sampler, Scene
from lwm.curation.world.stories import StoryWriter
from lwm.data.text.tokenizer import Tokenizer, train_tokenizer

SENTENCES = [f"And it came to pass on day {n} that they went out." for n in range(400)]


def all_scenes(count: int = 150) -> list[Scene]:
    sampler = Sampler(Random(0))
    makers = (sampler.still, sampler.pair, sampler.video, sampler.physics)
    return [make() for _ in range(count) for make in makers]


def test_captions_name_every_fact() -> None:
    random = Random(1)
    kinds = set()
    for scene in all_scenes():
        kinds.add(scene.kind)
        text, facts = caption(scene, random), scene.facts
        for key in ("thing", "first", "second", "background", "speed", "way", "side"):
            assert facts.get(key, "") in text
        for key in ("row", "column"):
            assert not facts.get(key) or facts[key] in text
        for place in ("left", "right", "top", "bottom"):
            if scene.kind in ("still", "appear"):
                named = place in (facts["row"], facts["column"])
                assert bool(re.search(rf"\b{place}\b", text)) == named
        assert scene.kind != "still" or facts["size"] in text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  ", text.replace("a unicorn", "it")), (
            text
        )
    assert len(kinds) == 10


def test_pairs_are_in_the_order_that_the_caption_says() -> None:
    random = Random(2)
    sampler = Sampler(Random(3))
    orders = (
        "{} on the left and {} on the right",
        "{} to the left of {}",
        "{1} to the right of {0}",
        "{} at the top and {} at the bottom",
        "{} above {}",
        "{1} below {0}",
    )
    for _ in range(200):
        scene = sampler.pair()
        first, second = scene.frames[0].things
        names = with_article(first.thing), with_article(second.thing)
        chosen = orders[:3] if first.top + first.size > second.top else orders[3:]
        text = caption(scene, random)
        assert any(text.startswith(order.format(*names)) for order in chosen), text


def test_a_kind_has_many_phrasings_and_a_partial_caption_leaves_facts_open() -> None:
    random = Random(4)
    for scene in all_scenes(5):
        assert len({caption(scene, random) for _ in range(200)}) >= 6
        shorter = [partial_caption(scene, random) for _ in range(20)]
        assert min(map(len, shorter)) < len(caption(scene, random))
        name = scene.facts.get("thing", scene.facts.get("first", ""))
        assert all(name in text for text in shorter)


def answers(scene: Scene) -> dict[str, str]:
    return {question.text: question.answer for question in questions(scene)}


def test_answers_are_right_for_scenes_written_by_hand() -> None:
    still = Scene("still", (), {"thing": "apple", "background": "blue", "size": "", "row": "top",
                                "column": ""})  # fmt: skip
    assert answers(still) == {
        "What is it?": "an apple",
        "How many things are there?": "one",
        "Where is it?": "at the top",
        "What color is the background?": "blue",
        "How big is it?": "medium",
    }
    pair = Scene("pair", (), {"first": "grapes", "second": "unicorn", "background": "pink",
                              "relation": "above", "bigger": "unicorn"})  # fmt: skip
    assert answers(pair) == {
        "How many things are there?": "two",
        "What is at the top?": "grapes",
        "What is at the bottom?": "a unicorn",
        "Which is bigger?": "the unicorn",
        "What color is the background?": "pink",
    }
    moving = Scene("move", (), {"thing": "dog", "background": "white", "way": "up",
                                "speed": "slowly"})  # fmt: skip
    assert answers(moving)["Which way does it move?"] == "up"
    assert answers(moving)["How fast does it move?"] == "slowly"
    assert place_words("", "") == "in the middle"
    assert place_words("bottom", "left") == "at the bottom left"
    assert place_words("", "right") == "on the right"


def test_a_sequence_is_two_videos_in_the_order_that_the_caption_says() -> None:
    sampler, random = Sampler(Random(4)), Random(4)
    for _ in range(50):
        scene = sampler.sequence()
        first, last = scene.parts
        assert scene.frames == first.frames + last.frames
        assert len(scene.frames) == 16
        before, after = caption(scene, random).split(", then ")
        for part, text in ((first, before), (last, after)):
            named = [part.facts[key] for key in ("thing", "first", "second") if key in part.facts]
            assert all(name in text for name in named)
            assert part.facts["background"] in text
        answers = {asked.kind: asked.answer for asked in questions(scene)}
        assert answers["background before"] == first.facts["background"]
        assert answers["background after"] == last.facts["background"]
        assert answers["begins"] in partial_caption(scene, random).split(", then ")[0]
        assert answers["closes"] in partial_caption(scene, random).split(", then ")[1]


def test_questions_ask_in_several_words_for_what_the_scene_shows() -> None:
    random = Random(5)
    for scene in all_scenes(20):
        kinds = {question.kind: question.answer for question in questions(scene)}
        asked = [random_question(scene, random) for _ in range(60)]
        assert {question.kind for question in asked} <= set(kinds)
        assert all(kinds[question.kind] == question.answer for question in asked)
        assert len({question.text for question in asked}) > len(kinds)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([*SENTENCES, " ".join(THINGS)], 400)


@pytest.mark.parametrize("length", [256, 1024])
def test_documents_fit_and_contain_their_answers(tokenizer: Tokenizer, length: int) -> None:
    writer = StoryWriter(tokenizer=tokenizer, length=length, sentences=SENTENCES)
    random = Random(6)
    longest = 0
    for _ in range(60):
        record = writer.document(random)
        count = sum(key.startswith("answer") for key in record)
        parts = [record[f"{part}{n}"] for n in range(count) for part in ("prompt", "answer")]
        longest = max(longest, len(tokenizer.encode("".join(parts))) + 2 * count)
        document = record["prompt0"].rsplit(" ASSISTANT: ", 1)[0]
        for number in range(count):
            assert record[f"answer{number}"] in document
        names = re.findall(r"The special magic (\w+) number is: \d{7}\n", document)
        assert len(names) == len(set(names))
        assert json.dumps(record)
    assert length / 2 < longest <= length
    tiny = StoryWriter(tokenizer=tokenizer, length=32, sentences=SENTENCES)
    with pytest.raises(InputError, match="32 tokens has no room for a fact"):
        tiny.document(random)
    repeated = writer.repetition(random)
    assert repeated["prompt"].endswith(f"Repeat: {repeated['answer']} ASSISTANT: ")
    assert len(tokenizer.encode(repeated["prompt"] + repeated["answer"])) <= length
    passage = writer.passage(random)["text"]
    assert passage in " ".join(SENTENCES * 2)
    assert len(tokenizer.encode(passage)) <= length - 2
