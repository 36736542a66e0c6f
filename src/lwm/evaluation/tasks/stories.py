"""Make stories about persons, places and objects, with a question that only they answer.

They follow bAbI's first five tasks: persons move, and take, drop and pass on objects; places lie
north, south, east and west of each other.

Source: Weston et al. 2015 (arXiv 1502.05698), tasks 1 to 5; names, verbs and questions are those
of the published data. Two things differ: a story has at most 24 facts, so that it fits a thousand
tokens (in bAbI's third task up to 320), and a question has exactly one answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

T = TypeVar("T")

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
MOVERS = ("Daniel", "John", "Mary", "Sandra")
GIVERS = ("Bill", "Fred", "Jeff", "Mary")
MAX_FACTS = 24

_MOVED = ("went to", "journeyed to", "travelled to", "moved to", "went back to")
_TOOK = ("got", "took", "grabbed", "picked up")
_DROPPED = ("dropped", "discarded", "put down", "left")
_GAVE = ("gave", "handed", "passed")
_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


@dataclass(frozen=True)
class Story:
    """Hold facts in order, and a question."""

    facts: Sequence[str]
    question: str
    answer: str
    sentence: str  # the answer in the form that the task's prompt requests


StoryMaker = Callable[[Random], Story]


@dataclass
class _World:
    random: Random
    persons: Sequence[str]
    facts: list[str] = field(default_factory=list)
    place: dict[str, str] = field(default_factory=dict)  # of each person who has moved
    holder: dict[str, str] = field(default_factory=dict)  # of each object that somebody has
    trail: dict[str, list[str]] = field(default_factory=dict)  # places of each object, in order
    gifts: list[tuple[str, str, str]] = field(default_factory=list)  # giver, object, receiver
    gift_last: bool = False  # whether the last fact is a gift

    def move(self) -> None:
        person = self.random.choice(self.persons)
        place = self.random.choice([p for p in PLACES if p != self.place.get(person)])
        self.place[person] = place
        for thing in (thing for thing, who in self.holder.items() if who == person):
            self.trail[thing].append(place)
        self._add(f"{person} {self.random.choice(_MOVED)} the {place}.")

    def take(self) -> None:
        """Let a person whose place is known take an object that may be there."""
        free = [thing for thing in OBJECTS if thing not in self.holder]
        choices = [
            (person, thing)
            for person, place in self.place.items()
            for thing in free
            if self.trail.get(thing, [place])[-1] == place
        ]
        if choices:
            person, thing = self.random.choice(choices)
            self.holder[thing] = person
            self.trail.setdefault(thing, [self.place[person]])
            there = self.random.choice(("", " there"))
            self._add(f"{person} {self.random.choice(_TOOK)} the {thing}{there}.")

    def drop(self) -> None:
        if self.holder:
            thing = self.random.choice(list(self.holder))
            person = self.holder.pop(thing)
            there = self.random.choice(("", " there"))
            self._add(f"{person} {self.random.choice(_DROPPED)} the {thing}{there}.")

    def give(self) -> None:
        """Pass an object to a person who is not known to be at another place."""
        choices = [
            (giver, thing, taker)
            for thing, giver in self.holder.items()
            for taker in self.persons
            if taker != giver and (self.place.get(taker, self.place[giver]) == self.place[giver])
        ]
        if choices:
            giver, thing, taker = self.random.choice(choices)
            self.holder[thing] = taker
            self.place[taker] = self.place[giver]
            self.gifts.append((giver, thing, taker))
            self._add(f"{giver} {self.random.choice(_GAVE)} the {thing} to {taker}.")
            self.gift_last = True

    def _add(self, fact: str) -> None:
        self.facts.append(fact)
        self.gift_last = False


_Action = Callable[[_World], None]
_CARRY: Sequence[_Action] = (_World.move, _World.take, _World.drop)
_PASS_ON: Sequence[_Action] = (_World.move, _World.take, _World.give)


def place_of_person(random: Random) -> Story:
    """Make a story of task 1, one supporting fact: the last move of a person."""
    world = _World(random, MOVERS)
    for _ in range(random.randint(2, 10)):
        world.move()
    person = random.choice(list(world.place))
    place = world.place[person]
    sentence = f"The most recent location of {person} is {place}."
    return Story(world.facts, f"Where is {person}?", place, sentence)


def place_of_object(random: Random) -> Story:
    """Make a story of task 2, two supporting facts: who had an object, and where they were."""
    world, things = _simulate(random, MOVERS, _CARRY, 3, lambda world: list(world.trail))
    thing = random.choice(things)
    place = world.trail[thing][-1]
    return Story(world.facts, f"Where is the {thing}?", place, f"The {thing} is in the {place}.")


def past_place_of_object(random: Random) -> Story:
    """Make a story of task 3, three supporting facts: where an object was before its last place,
    to which it came only once."""

    def moved(world: _World) -> list[str]:
        return [
            thing
            for thing, places in world.trail.items()
            if len(places) > 1 and places.count(places[-1]) == 1
        ]

    world, things = _simulate(random, MOVERS, _CARRY, 4, moved)
    thing = random.choice(things)
    before, place = world.trail[thing][-2:]
    question = f"Where was the {thing} before the {place}?"
    sentence = f"Before the {place} the {thing} was in the {before}."
    return Story(world.facts, question, before, sentence)


def relative_place(random: Random) -> Story:
    """Make a story of task 4, relations of two: three places in a line, of which the middle one
    is asked about, where every reading has the same answer."""
    left, middle, right = random.sample(PLACES, 3)
    direction = random.choice(list(_OPPOSITE))
    facts = []
    for first, second in ((left, middle), (middle, right)):
        wordings = (first, direction, second), (second, _OPPOSITE[direction], first)
        one, way, other = random.choice(wordings)
        facts.append(f"The {one} is {way} of the {other}.")
    random.shuffle(facts)
    way, answer = random.choice(((direction, left), (_OPPOSITE[direction], right)))
    question = random.choice(
        (f"What is {way} of the {middle}?", f"What is the {middle} {_OPPOSITE[way]} of?")
    )
    return Story(facts, question, answer, answer)


def gift(random: Random) -> Story:
    """Make a story of task 5, relations of three: about the gift that ends the story."""
    world, questions = _simulate(random, GIVERS, _PASS_ON, 3, _gift_questions)
    question, answer = random.choice(questions)
    return Story(world.facts, question, answer, answer)


def _gift_questions(world: _World) -> list[tuple[str, str]]:
    if not world.gift_last:
        return []
    giver, thing, taker = last = world.gifts[-1]
    # The question, the parts of the gift that it names, and the part that it asks for.
    forms = [
        (f"What did {giver} give to {taker}?", (0, 2), 1),
        (f"Who gave the {thing} to {taker}?", (1, 2), 0),
        (f"Who did {giver} give the {thing} to?", (0, 1), 2),
        (f"Who gave the {thing}?", (1,), 0),
        (f"Who received the {thing}?", (1,), 2),
    ]
    questions = []
    for question, named, queried in forms:
        matching = [gift for gift in world.gifts if all(gift[i] == last[i] for i in named)]
        if len({gift[queried] for gift in matching}) == 1:
            questions.append((question, last[queried]))
    return questions


def _simulate(
    random: Random,
    persons: Sequence[str],
    actions: Sequence[_Action],
    least: int,
    choices: Callable[[_World], list[T]],
) -> tuple[_World, list[T]]:
    """Let things happen until there is a choice of questions; return the world and the choices."""
    while True:  # a world without a question after MAX_FACTS is discarded
        world = _World(random, persons)
        length = random.randint(least, MAX_FACTS - 4)
        while len(world.facts) < MAX_FACTS:
            random.choice(actions)(world)
            if len(world.facts) >= length and (chosen := choices(world)):
                return world, chosen
