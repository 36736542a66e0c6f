"""Stories about persons, places and objects with a question whose answer follows from them alone.

A small world that bAbI's first five tasks describe: persons move, take objects, drop them, hand
them on; places lie north, south, east and west of each other. Knows the world and English; knows
nothing of tokens and of the text a story is hidden in.

Source: Weston et al. 2015 (arXiv 1502.05698), tasks 1 to 5: the names, the verbs and the questions
are those of the published data. Ours alone: a story holds at most 24 facts, so that it fits a
thousand tokens (bAbI's third task has up to 320), and a question is asked only where it has one
answer.
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

LONGEST = 24
"""Facts of a story."""

_MOVED = ("went to", "journeyed to", "travelled to", "moved to", "went back to")
_TOOK = ("got", "took", "grabbed", "picked up")
_DROPPED = ("dropped", "discarded", "put down", "left")
_GAVE = ("gave", "handed", "passed")
_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


@dataclass(frozen=True, kw_only=True)
class Story:
    """Facts in their order, and a question.

    Args:
        answer: the one word that answers it.
        sentence: the answer as the prompt of its task wants it written.
    """

    facts: Sequence[str]
    question: str
    answer: str
    sentence: str


@dataclass
class _World:
    """What a reader knows after the facts so far.

    Args:
        where: the place of each person who has moved.
        holder: who has an object, for those that somebody has.
        been: places that an object has been at, one after another; a person holding it takes it
            along.
        gifts: who gave what to whom.
        gave: whether the last fact tells of a gift.
    """

    random: Random
    persons: Sequence[str]
    facts: list[str] = field(default_factory=list)
    where: dict[str, str] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    been: dict[str, list[str]] = field(default_factory=dict)
    gifts: list[tuple[str, str, str]] = field(default_factory=list)
    gave: bool = False

    def move(self) -> bool:
        person = self.random.choice(self.persons)
        place = self.random.choice([p for p in PLACES if p != self.where.get(person)])
        self.where[person] = place
        for thing in (thing for thing, who in self.holder.items() if who == person):
            self.been[thing].append(place)
        return self._tell(f"{person} {self.random.choice(_MOVED)} the {place}.")

    def take(self) -> bool:
        """A person who is known to be somewhere takes what lies there, or what nobody has met."""
        free = [thing for thing in OBJECTS if thing not in self.holder]
        choices = [
            (person, thing)
            for person, place in self.where.items()
            for thing in free
            if self.been.get(thing, [place])[-1] == place
        ]
        if not choices:
            return False
        person, thing = self.random.choice(choices)
        self.holder[thing] = person
        self.been.setdefault(thing, [self.where[person]])
        there = self.random.choice(("", " there"))
        return self._tell(f"{person} {self.random.choice(_TOOK)} the {thing}{there}.")

    def drop(self) -> bool:
        if not self.holder:
            return False
        thing = self.random.choice(list(self.holder))
        person = self.holder.pop(thing)
        there = self.random.choice(("", " there"))
        return self._tell(f"{person} {self.random.choice(_DROPPED)} the {thing}{there}.")

    def give(self) -> bool:
        """Between persons who are at one place, as far as the reader knows: nobody is known to be
        elsewhere."""
        choices = [
            (giver, thing, taker)
            for thing, giver in self.holder.items()
            for taker in self.persons
            if taker != giver and (self.where.get(taker, self.where[giver]) == self.where[giver])
        ]
        if not choices:
            return False
        giver, thing, taker = self.random.choice(choices)
        self.holder[thing] = taker
        self.where[taker] = self.where[giver]
        self.gifts.append((giver, thing, taker))
        self._tell(f"{giver} {self.random.choice(_GAVE)} the {thing} to {taker}.")
        self.gave = True
        return True

    def _tell(self, fact: str) -> bool:
        self.facts.append(fact)
        self.gave = False
        return True


def where_is_a_person(random: Random) -> Story:
    """Task 1, one supporting fact: the last move of a person."""
    world = _World(random, MOVERS)
    for _ in range(random.randint(2, 10)):
        world.move()
    person = random.choice(list(world.where))
    place = world.where[person]
    return Story(
        facts=world.facts,
        question=f"Where is {person}?",
        answer=place,
        sentence=f"The most recent location of {person} is {place}.",
    )


def where_is_an_object(random: Random) -> Story:
    """Task 2, two supporting facts: who had an object, and where that person was."""
    acts = (_World.move, _World.take, _World.drop)
    world, things = _lived(random, MOVERS, acts, 3, lambda world: list(world.been))
    thing = random.choice(things)
    place = world.been[thing][-1]
    return Story(
        facts=world.facts,
        question=f"Where is the {thing}?",
        answer=place,
        sentence=f"The {thing} is in the {place}.",
    )


def where_was_an_object(random: Random) -> Story:
    """Task 3, three supporting facts: where an object was before it came to where it is, a place
    it came to once."""
    acts = (_World.move, _World.take, _World.drop)
    world, things = _lived(
        random, MOVERS, acts, 4,
        lambda world: [
            thing
            for thing, places in world.been.items()
            if len(places) > 1 and places.count(places[-1]) == 1
        ],
    )  # fmt: skip
    thing = random.choice(things)
    before, place = world.been[thing][-2:]
    return Story(
        facts=world.facts,
        question=f"Where was the {thing} before the {place}?",
        answer=before,
        sentence=f"Before the {place} the {thing} was in the {before}.",
    )


def which_place_lies_there(random: Random) -> Story:
    """Task 4, relations of two: three places in a row, asked from the middle one, where no
    reading has two answers."""
    left, middle, right = random.sample(PLACES, 3)
    direction = random.choice(list(_OPPOSITE))
    facts = []
    for first, second in ((left, middle), (middle, right)):
        told = (first, direction, second), (second, _OPPOSITE[direction], first)
        one, way, other = random.choice(told)
        facts.append(f"The {one} is {way} of the {other}.")
    random.shuffle(facts)
    way, answer = random.choice(((direction, left), (_OPPOSITE[direction], right)))
    question = random.choice(
        (f"What is {way} of the {middle}?", f"What is the {middle} {_OPPOSITE[way]} of?")
    )
    return Story(facts=facts, question=question, answer=answer, sentence=answer)


def who_gave_what_to_whom(random: Random) -> Story:
    """Task 5, relations of three: about the gift that the story ends with, in words that fit no
    other gift with another answer."""
    acts = (_World.move, _World.take, _World.give)
    world, asked = _lived(random, GIVERS, acts, 3, _about_the_last_gift)
    question, answer = random.choice(asked)
    return Story(facts=world.facts, question=question, answer=answer, sentence=answer)


def _about_the_last_gift(world: _World) -> list[tuple[str, str]]:
    """Questions with their answers."""
    if not world.gave:
        return []
    giver, thing, taker = last = world.gifts[-1]
    forms = [
        (f"What did {giver} give to {taker}?", (0, 2), 1),
        (f"Who gave the {thing} to {taker}?", (1, 2), 0),
        (f"Who did {giver} give the {thing} to?", (0, 1), 2),
        (f"Who gave the {thing}?", (1,), 0),
        (f"Who received the {thing}?", (1,), 2),
    ]
    return [
        (question, last[asked])
        for question, given, asked in forms
        if len({gift[asked] for gift in world.gifts if all(gift[i] == last[i] for i in given)})
        == 1
    ]


def _lived(
    random: Random,
    persons: Sequence[str],
    acts: Sequence[Callable[[_World], bool]],
    least: int,
    askable: Callable[[_World], list[T]],
) -> tuple[_World, list[T]]:
    """A world in which things happened until there was something to ask about, and what that is.

    Args:
        least: facts of the shortest story.
    """
    while True:  # a world that comes to no question in time makes way for another
        world = _World(random, persons)
        wanted = random.randint(least, LONGEST - 4)
        while len(world.facts) < LONGEST:
            random.choice(acts)(world)
            if len(world.facts) >= wanted and (found := askable(world)):
                return world, found
