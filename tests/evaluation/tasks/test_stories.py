"""Check stories by replaying their sentences, independently of the code that makes them."""

import random
import re
from itertools import pairwise

import pytest

from lwm.evaluation.tasks import stories

MOVE = re.compile(r"(\w+) (?:went back|went|journeyed|travelled|moved) to the (\w+)\.")
TAKE = re.compile(r"(\w+) (?:got|took|grabbed|picked up) the (\w+)(?: there)?\.")
DROP = re.compile(r"(\w+) (?:dropped|discarded|put down|left) the (\w+)(?: there)?\.")
GIVE = re.compile(r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)\.")
LIES = re.compile(r"The (\w+) is (north|south|east|west) of the (\w+)\.")
ACROSS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}


class Reader:
    """Replay a story fact by fact, and note where every object is after each."""

    def __init__(self, facts) -> None:
        self.where: dict[str, str] = {}
        hands: dict[str, str] = {}
        lying: dict[str, str] = {}
        self.trail: dict[str, list[str]] = {}
        self.gifts = []
        for fact in facts:
            if match := MOVE.fullmatch(fact):
                assert self.where.get(match[1]) != match[2]
                self.where[match[1]] = match[2]
            elif match := TAKE.fullmatch(fact):
                assert match[2] not in hands
                assert lying.pop(match[2], self.where[match[1]]) == self.where[match[1]]
                hands[match[2]] = match[1]
            elif match := DROP.fullmatch(fact):
                assert hands.pop(match[2]) == match[1]
                lying[match[2]] = self.where[match[1]]
            elif match := GIVE.fullmatch(fact):
                assert hands[match[2]] == match[1] != match[3]
                hands[match[2]] = match[3]
                self.gifts.append(match.groups())
                self.where.setdefault(match[3], self.where[match[1]])
                assert self.where[match[3]] == self.where[match[1]]
            else:
                raise AssertionError(fact)
            for thing in {*hands, *lying}:
                place = lying.get(thing) or self.where[hands[thing]]
                trail = self.trail.setdefault(thing, [])
                if trail[-1:] != [place]:
                    trail.append(place)

    def answers(self, question: str) -> set[str]:
        """Return all answers of a question."""
        if match := re.fullmatch(r"Where is (the )?(\w+)\?", question):
            return {self.trail[match[2]][-1] if match[1] else self.where[match[2]]}
        if match := re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question):
            trail = self.trail[match[1]]
            return {a for a, b in pairwise(trail) if b == match[2]}
        forms = {
            r"What did (?P<a>\w+) give to (?P<c>\w+)\?": 1,
            r"Who gave the (?P<b>\w+) to (?P<c>\w+)\?": 0,
            r"Who did (?P<a>\w+) give the (?P<b>\w+) to\?": 2,
            r"Who gave the (?P<b>\w+)\?": 0,
            r"Who received the (?P<b>\w+)\?": 2,
        }
        for form, asked in forms.items():
            if match := re.fullmatch(form, question):
                named = match.groupdict()
                return {
                    gift[asked]
                    for gift in self.gifts
                    if all(gift["abc".index(name)] == said for name, said in named.items())
                }
        raise AssertionError(question)


def map_answers(facts, question: str) -> set[str]:
    """Answer a question of task 4 from a map with one step between adjacent places."""
    steps = [match.groups() for fact in facts if (match := LIES.fullmatch(fact))]
    assert len(steps) == len(facts) == 2
    at = {steps[0][2]: (0, 0)}
    for _ in facts:
        for one, way, other in steps:
            x, y = ACROSS[way]
            if other in at:
                at[one] = (at[other][0] + x, at[other][1] + y)
            elif one in at:
                at[other] = (at[one][0] - x, at[one][1] - y)
    if match := re.fullmatch(r"What is (\w+) of the (\w+)\?", question):
        (x, y), place, sign = ACROSS[match[1]], match[2], 1
    else:
        match = re.fullmatch(r"What is the (\w+) (\w+) of\?", question)
        assert match
        (x, y), place, sign = ACROSS[match[2]], match[1], -1
    here = at[place]
    way = (sign * x, sign * y)
    # Anything further that way on the map, a step or more, answers it.
    return {
        name for name, (a, b) in at.items() if (a - here[0]) * way[0] + (b - here[1]) * way[1] > 0
    }


@pytest.mark.parametrize(
    "tell",
    [
        stories.place_of_person,
        stories.place_of_object,
        stories.past_place_of_object,
        stories.relative_place,
        stories.gift,
    ],
)
def test_a_question_has_exactly_one_answer(tell) -> None:
    answers, lengths = set(), set()
    for seed in range(300):
        story = tell(random.Random(seed))
        assert story == tell(random.Random(seed))
        if tell is stories.relative_place:
            replayed = map_answers(story.facts, story.question)
        else:
            replayed = Reader(story.facts).answers(story.question)
        assert replayed == {story.answer}, story
        assert story.answer in story.sentence
        assert len(story.facts) <= stories.MAX_FACTS
        answers.add(story.answer)
        lengths.add(len(story.facts))
    assert len(answers) >= 6
    if tell is not stories.relative_place:
        assert len(lengths) > 8
