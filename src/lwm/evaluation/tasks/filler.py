"""Make what tasks hide things in and what they hide: sentences, words, compounds and UUIDs.

`words.txt` has adjectives, nouns and cities; their order determines what a seed gives.
"""

import re
import uuid
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from random import Random

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

ADJECTIVES, NOUNS, CITIES = (
    tuple(part.split())
    for part in files("lwm.evaluation.tasks")
    .joinpath("words.txt")
    .read_text(encoding="utf-8")
    .split("\n\n")
)

_PLAIN_WORD = re.compile(r"[a-z]{3,12}")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*$")
# A text whose sentences are longer on average is cut into sentences of 20 words.
_MAX_WORDS_PER_SENTENCE, _PSEUDO_SENTENCE = 200, 20


def random_uuid(random: Random) -> str:
    """Make a random UUID (version 4)."""
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


def plain_words(words: Sequence[str]) -> list[str]:
    """Sort the distinct plain words of a text and of `words.txt`: 3 to 12 lower-case letters."""
    plain = {word for word in set(words) if _PLAIN_WORD.fullmatch(word)}
    return sorted(plain.union(ADJECTIVES, NOUNS))


def distinct(make: Callable[[Random], str], random: Random) -> Iterator[str]:
    """Yield what `make` gives, without end, leaving out repetitions."""
    used: set[str] = set()
    while True:
        value = make(random)
        if value not in used:
            used.add(value)
            yield value


def distinct_words(random: Random, pool: Sequence[str]) -> Iterator[str]:
    """Yield the words of a pool in random order, then compounds such as `crooked-lantern`."""
    yield from random.sample(pool, len(pool))
    used: set[str] = set()
    while True:
        word = f"{random.choice(ADJECTIVES)}-{random.choice(NOUNS)}"
        while word in used:
            word = f"{random.choice(ADJECTIVES)}-{word}"
        used.add(word)
        yield word


class Prose:
    """Hide sentences in a text."""

    def __init__(self, text: str) -> None:
        self.words = text.split()
        self._ends = [
            place for place, word in enumerate(self.words, 1) if _SENTENCE_END.search(word)
        ]
        if len(self._ends) * _MAX_WORDS_PER_SENTENCE < len(self.words):
            self._ends = list(range(_PSEUDO_SENTENCE, len(self.words), _PSEUDO_SENTENCE))

    def __len__(self) -> int:
        return len(self.words)

    def rotated(self, depth: float) -> "Prose":
        """Return the text from the sentence at a depth (below 1) on, then its beginning."""
        place = int(depth * len(self._ends))
        start = self._ends[place] if self._ends else 0
        other = Prose.__new__(Prose)
        other.words = self.words[start:] + self.words[:start]
        other._ends = [end - start for end in self._ends[place + 1 :]]
        other._ends += [end + len(self.words) - start for end in self._ends[: place + 1]]
        return other

    def hiding(self, count: int, sentences: Sequence[str], depths: Sequence[float]) -> str:
        """Return the first words, with sentences at ascending depths from 0 to 1."""
        bounds = [0, *self._ends[: bisect_left(self._ends, count)], count]
        parts, last = [], 0
        for sentence, depth in zip(sentences, depths, strict=True):
            place = bounds[int((len(bounds) - 1) * depth)]
            parts += [*self.words[last:place], sentence]
            last = place
        return " ".join([*parts, *self.words[last:count]])


def scatter(lines: Sequence[str], among: Sequence[str], depths: Sequence[float]) -> list[str]:
    """Insert lines among others, at ascending depths from 0 to 1."""
    places = [round(depth * len(among)) for depth in depths]
    result: list[str] = []
    for at in range(len(among) + 1):
        result += lines[bisect_left(places, at) : bisect_right(places, at)]
        result += among[at : at + 1]
    return result
