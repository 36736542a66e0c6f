"""Write training texts of a given length: passages, lists to repeat, documents with facts to find.

A document holds several facts between its sentences and is followed by questions about some of
them. Most facts have the form of the needle test (`evaluation/tasks/needle.py`); their names are
invented, so that a model learns to copy any name. Lists to repeat teach copying itself, on which
finding depends, within far fewer tokens (Olsson et al. 2022, arXiv 2209.11895, on induction).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from lwm.core.errors import InputError
from lwm.curation.world.drawing import BACKGROUNDS, THINGS
from lwm.data.text.tokenizer import Tokenizer
from lwm.data.text.vision_texts import SYSTEM

_STYLE = (
    "Don't give information outside the document or repeat your findings. Keep your response "
    "short and direct."
)
_SYLLABLES = (
    "ba", "be", "bo", "ca", "co", "da", "de", "di", "do", "fa", "fi", "ga", "go", "ha", "he",
    "ho", "ja", "jo", "ka", "ke", "ki", "la", "le", "li", "lo", "ma", "me", "mi", "mo", "na",
    "ne", "no", "pa", "pe", "po", "ra", "re", "ri", "ro", "sa", "se", "shi", "so", "ta", "te",
    "ti", "to", "va", "ve", "vi", "wa", "ya", "yo", "za", "zu", "lan", "ran", "tin", "mar",
    "ber", "dor", "gar", "hol", "kin", "len", "min", "nor", "per", "rin", "san", "tor",
    "ville", "burg", "ton",
)  # fmt: skip
_ONSETS = (
    "b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "q", "r", "s", "t", "v", "w",
    "x", "y", "z", "br", "ch", "cl", "dr", "fl", "gr", "kr", "pl", "sh", "st", "th", "tr",
)  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "ai", "au", "ee", "ia", "ou")
_CODAS = ("", "", "", "l", "m", "n", "r", "s", "t", "ck", "ng", "nd", "st")
_WORD = re.compile(r"[A-Za-z]{4,}")
_PLACES = (
    "kitchen", "garden", "attic", "cellar", "barn", "library", "harbor", "market", "tower",
    "forest", "cave", "school", "workshop", "bakery", "valley", "station",
)  # fmt: skip
_MOST_FACTS = 128
_TOKENS_PER_FACT = 40  # of a document's length, so that short ones are rich in facts
_LONGEST_LIST = 48


@dataclass(frozen=True)
class _Fact:
    sentence: str
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class StoryWriter:
    """Write records whose tokens fit a row.

    Args:
        length: tokens of a row, the longest that a record becomes.
        sentences: the text between facts, in order.
        most_questions: about one document.
        plain_names: whether names consist of a few syllables; else of any letters as well, and of
            words from the sentences, so that a model learns to copy names it has never seen.
    """

    tokenizer: Tokenizer
    length: int
    sentences: Sequence[str]
    most_questions: int = 64
    plain_names: bool = False
    _lengths: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    """Tokens of the sentences used so far."""

    def passage(self, random: Random) -> dict[str, Any]:
        """Return consecutive sentences as one text."""
        text = " ".join(self._sentences(random, self.length - 2))
        return {"fields": "text", "text": text}

    def repetition(self, random: Random) -> dict[str, Any]:
        """Return a request to repeat a list, and the list: of words, names, numbers or all.

        Words differ from each other and are one token each, so that they are copied first.
        """
        names = [self._name(random) for _ in range(_LONGEST_LIST)]
        numbers = [str(random.randrange(10_000_000)) for _ in range(_LONGEST_LIST)]
        words = random.sample((*THINGS, *_PLACES), _LONGEST_LIST)
        kinds = (words, names, numbers, random.sample(words + names + numbers, _LONGEST_LIST))
        (kind,) = random.choices(kinds, weights=(2, 1, 1, 1))
        items = kind[: random.randint(4, min(self.length // 4, _LONGEST_LIST))]
        while True:
            listed = " ".join(items)
            prompt = f"{SYSTEM} USER: Repeat: {listed} ASSISTANT: "
            if len(self.tokenizer.encode(prompt + listed)) <= self.length - 4 or len(items) == 1:
                return {"fields": "[prompt],answer", "prompt": prompt, "answer": listed}
            items.pop()

    def document(self, random: Random) -> dict[str, Any]:
        """Return a document with facts, and questions about some of them.

        The keys are `prompt0`, `answer0`, `prompt1` and so on; only answers carry loss. Raises
        InputError if not even one fact and its question fit.
        """
        most = min(_MOST_FACTS, self.length // _TOKENS_PER_FACT)
        facts = self._facts(random, random.randint(2, max(3, most)))
        asked = random.sample(facts, min(len(facts), self.most_questions))
        style = f" {_STYLE}" if random.random() < 0.5 else ""
        while True:
            questions = [f"{fact.question}{style} ASSISTANT: " for fact in asked]
            turns = [
                part for q, fact in zip(questions, asked, strict=True) for part in (q, fact.answer)
            ]
            written = [SYSTEM, *turns, *(fact.sentence for fact in facts)]
            # At most this many tokens are at the borders of parts or end turns.
            borders = 4 * len(facts) + 8 * len(asked) + 8
            room = self.length - len(self.tokenizer.encode(" ".join(written))) - borders
            if room >= 0:
                break
            if len(facts) == 1:
                raise InputError(
                    f"a document of {self.length} tokens has no room for a fact and a question, "
                    "which this tokenizer makes longer; raise --length"
                )
            if 2 * len(asked) > max(len(facts), 2):
                asked.pop()
            else:
                facts.remove(next(fact for fact in facts if fact not in asked))
        for number in range(2, len(turns), 2):
            turns[number] = f" USER: {turns[number]}"
        lines = self._sentences(random, room)
        places = sorted(random.randint(0, len(lines)) for _ in facts)
        for fact, place in zip(reversed(facts), reversed(places), strict=True):
            lines.insert(place, fact.sentence)
        context = "".join(
            line if line.startswith("\n") or not number else f" {line}"
            for number, line in enumerate(lines)
        )
        turns[0] = f"{SYSTEM} USER: {context} {turns[0]}"
        record: dict[str, Any] = {}
        fields: list[str] = []
        for number in range(0, len(turns), 2):
            prompt, answer = f"prompt{number // 2}", f"answer{number // 2}"
            record |= {prompt: turns[number], answer: turns[number + 1]}
            fields += [f"[{prompt}]", answer, "<|eos|>"]
        return {"fields": ",".join(fields[:-1]), **record}

    def _sentences(self, random: Random, tokens: int) -> list[str]:
        """Return consecutive sentences of at most a number of tokens."""
        start = random.randrange(len(self.sentences))
        chosen: list[str] = []
        used = 0
        while True:
            index = (start + len(chosen)) % len(self.sentences)
            if index not in self._lengths:  # after a space
                self._lengths[index] = len(self.tokenizer.encode(f" {self.sentences[index]}"))
            used += self._lengths[index]
            if used > tokens:
                return chosen
            chosen.append(self.sentences[index])

    def _name(self, random: Random) -> str:
        kind = 0.0 if self.plain_names else random.random()
        if kind < 0.4:
            syllables = random.choices(_SYLLABLES, k=random.choice((2, 2, 3)))
        elif kind < 0.7:
            groups = (_ONSETS, _VOWELS, _CODAS)
            syllables = [random.choice(x) for _ in range(random.randint(1, 3)) for x in groups]
        else:
            syllables = [random.choice(_WORD.findall(random.choice(self.sentences)) or ["Eden"])]
        return "".join(syllables).capitalize()

    def _facts(self, random: Random, count: int) -> list[_Fact]:
        """Return facts about different subjects."""
        facts: dict[str, _Fact] = {}
        things = random.sample(THINGS, min(count, len(THINGS)))
        while len(facts) < count:
            name = self._name(random)
            if name in facts:
                continue
            # Each thing occurs at most once.
            if random.random() < 0.6 or len(facts) >= len(things):
                number = str(random.randrange(1_000_000, 10_000_000))
                sentence = f"The special magic {name} number is: {number}"
                question = random.choice(
                    (
                        f"What is the special magic {name} number?",
                        f"What is the special magic {name} number?",
                        f"What is the special magic number for {name}?",
                    )
                )
                facts[name] = _Fact(f"\n{sentence}\n", question, sentence)
                continue
            place, color = random.choice(_PLACES), random.choice(tuple(BACKGROUNDS))
            thing = things[len(facts)]
            sentence = f"{name} put the {color} {thing} in the {place}."
            question, answer = random.choice(
                (
                    (f"Where is the {color} {thing}?", f"in the {place}"),
                    (f"Who put the {color} {thing} in the {place}?", name),
                    (f"What color is the {thing} of {name}?", color),
                )
            )
            facts[name] = _Fact(sentence, question, answer)
        return list(facts.values())
