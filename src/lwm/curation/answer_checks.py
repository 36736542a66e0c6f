"""Whether a question and its answer are well-formed and have support in a text.

Plain words in common, no model: it refuses what a weak model makes up, and cannot tell a wrong
answer made of the right words. The lists are English. Knows strings alone.
"""

import re
from bisect import bisect_right
from collections import Counter
from itertools import pairwise

SUPPORT = 0.75
"""Share of the words of a question, and of its answer, that one place of the text must have."""

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’»)\]]*\s+|\n\s*\n\s*")
_ENDED = re.compile(r"[.!…][\"'”’»)\]]*$")
_SPEAKS_OF_THE_TEXT = re.compile(
    r"\b(would|do|did|can|could|are|if) you\b|\byour?\b|\b(this|the) (passage|text|sentence)\b",
    re.IGNORECASE,
)
_COMMON = frozenset(
    "a about above after again all also am an and another answer any are as at be because been "  # noqa: SIM905
    "before being but by came can come could did do does doing done down for from get go had has "
    "have having he her here hers him his how i if in into is it its let made make man may me men "
    "might more most must my name named no nor not of on one only or other our out over passage "
    "people person place purpose reason said same saith say saying sentence shall she should so "
    "some such tell text than that the thee their them then there these they thing things this "
    "those thou thy to told too under unto up upon us very was way we went were what when where "
    "which while who whom whose why will with woman women would ye yet you your".split()
)
"""Words that say nothing of what a question is about."""


def sentence_ends(text: str) -> list[int]:
    """Where sentences and paragraphs end, the space behind them included."""
    return [match.end() for match in _SENTENCE_END.finditer(text)]


def sentences(text: str) -> list[str]:
    """Sentences of a text, stripped; none is empty."""
    ends = [0, *sentence_ends(text), len(text)]
    parts = (text[begin:end].strip() for begin, end in pairwise(ends))
    return [part for part in parts if part]


def end_within(text: str, ends: list[int], begin: int, limit: int) -> int:
    """Where to cut a text behind `begin` and not behind `limit`: at the last sentence's end in the
    second half between them, else at the last word's, else at `limit`."""
    middle = begin + (limit - begin) // 2
    before = bisect_right(ends, limit)
    if before and ends[before - 1] > middle:
        return ends[before - 1]
    space = max(text.rfind(mark, middle, limit) for mark in " \n")
    return limit if space < 0 else space + 1


def _stem(word: str) -> str:
    """A word without the commonest English endings, so that `moved` and `moveth` are `mov`."""
    for ending in ("ing", "eth", "est", "ied", "ies", "ed", "es", "en", "s", "d", "e", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word.removesuffix(ending)
    return word


def content(text: str) -> set[str]:
    """Stems of the words that say something."""
    words = (word.lower().replace("’", "'").removesuffix("'s") for word in WORD.findall(text))
    return {_stem(word) for word in words if word not in _COMMON}


def names(text: str) -> set[str]:
    """Stems of the names and numbers: capitals that open no sentence, and digits."""
    found = set()
    for match in WORD.finditer(text):
        word, before = match.group(), text[: match.start()].rstrip(" \"'“‘(")
        opens = not before or before.endswith((".", "!", "?", ":"))
        if word[0].isdigit() or (word[0].isupper() and not opens):
            found |= content(word)
    return found


def repeats(text: str, run: int = 5) -> bool:
    """Whether the same words come in a row again."""
    words = [word.lower() for word in WORD.findall(text)]
    runs = Counter(tuple(words[i : i + run]) for i in range(len(words) - run + 1))
    return any(count > 1 for count in runs.values())


def question_fault(question: str, sentence: str, text: str) -> str | None:
    """Why a question is of no use, or None if it is of use.

    Args:
        sentence: what it was to be about, a sentence of `text`.
    """
    if not question:
        return "question empty"
    if not question.endswith("?"):
        return "question without '?'"
    if len(WORD.findall(question)) > 40:
        return "question too long"
    if repeats(question):
        return "question repeats itself"
    if _SPEAKS_OF_THE_TEXT.search(question):
        return "question about the reader or the passage"
    if not content(question) & content(sentence) or not names(question) <= content(text):
        return "question about something else"
    return None


def answer_fault(answer: str, question: str, text: str) -> str | None:
    """Why an answer is of no use, or None if it is of use.

    An answer has support where one sentence of the text, with the next, has most of the words of
    the question and most of those that the answer adds, and no name in it is foreign to the text.
    """
    if not answer:
        return "answer empty"
    if "?" in answer:
        return "answer asks"
    if not _ENDED.search(answer):
        return "answer cut off"
    if repeats(answer):
        return "answer repeats itself"
    about = content(question)
    added = content(answer) - about
    if not added:
        return "answer adds nothing to the question"
    lines = [content(line) for line in sentences(text)]
    windows = [one | other for one, other in zip(lines, [*lines[1:], set()], strict=True)]

    def most(words: set[str], window: set[str]) -> bool:
        return len(words & window) >= SUPPORT * len(words)

    supported = any(most(added, window) and most(about | added, window) for window in windows)
    if not supported or not names(answer) <= content(text):
        return "answer without support"
    return None
