"""Check that a question and its answer are well-formed and supported by a text.

The checks compare words and need no model. They refuse what a weak model invents, but cannot
detect a wrong answer made of the right words. The word lists are English.
"""

import re
from bisect import bisect_right
from collections import Counter
from itertools import pairwise

SUPPORT = 0.75
"""Share of the words of a question, and of its answer, that one place of the text must have."""

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’»)\]]*\s+|\n\s*\n\s*")
_COMPLETE = re.compile(r"[.!…][\"'”’»)\]]*$")
_ABOUT_READER_OR_TEXT = re.compile(
    r"\b(would|do|did|can|could|are|if) you\b|\byour?\b|\b(this|the) (passage|text|sentence)\b",
    re.IGNORECASE,
)
# Words that do not show what a question is about.
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


def sentence_ends(text: str) -> list[int]:
    """Return where sentences and paragraphs end, after the following whitespace."""
    return [match.end() for match in _SENTENCE_END.finditer(text)]


def sentences(text: str) -> list[str]:
    """Split a text into sentences, stripped and not empty."""
    ends = [0, *sentence_ends(text), len(text)]
    parts = (text[begin:end].strip() for begin, end in pairwise(ends))
    return [part for part in parts if part]


def split_point(text: str, ends: list[int], begin: int, limit: int) -> int:
    """Return the last end of a sentence, or else of a word, in the second half before `limit`."""
    middle = begin + (limit - begin) // 2
    before = bisect_right(ends, limit)
    if before and ends[before - 1] > middle:
        return ends[before - 1]
    space = max(text.rfind(mark, middle, limit) for mark in " \n")
    return limit if space < 0 else space + 1


def _stem(word: str) -> str:
    """Remove the most common English endings, so that `moved` and `moveth` are `mov`."""
    for ending in ("ing", "eth", "est", "ied", "ies", "ed", "es", "en", "s", "d", "e", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word.removesuffix(ending)
    return word


def content_stems(text: str) -> set[str]:
    """Return the stems of the words that are not common."""
    words = (word.lower().replace("’", "'").removesuffix("'s") for word in WORD.findall(text))
    return {_stem(word) for word in words if word not in _COMMON}


def name_stems(text: str) -> set[str]:
    """Return the stems of names and numbers: capitalized words within a sentence, and digits."""
    names = set()
    for match in WORD.finditer(text):
        word, before = match.group(), text[: match.start()].rstrip(" \"'“‘(")
        starts_sentence = not before or before.endswith((".", "!", "?", ":"))
        if word[0].isdigit() or (word[0].isupper() and not starts_sentence):
            names |= content_stems(word)
    return names


def question_fault(question: str, sentence: str, text: str) -> str | None:
    """Return why a question about a sentence of a text is unusable, or None if it is usable."""
    if not question:
        return "question empty"
    if not question.endswith("?"):
        return "question without '?'"
    if len(WORD.findall(question)) > 40:
        return "question too long"
    if _repeats(question):
        return "question repeats itself"
    if _ABOUT_READER_OR_TEXT.search(question):
        return "question about the reader or the passage"
    on_topic = content_stems(question) & content_stems(sentence)
    named = name_stems(question) <= content_stems(text)
    return None if on_topic and named else "question about something else"


def answer_fault(answer: str, question: str, text: str) -> str | None:
    """Return why an answer is unusable, or None if it is usable.

    One sentence of the text, together with the next one, must contain most words of the question
    and most words that the answer adds; all names of the answer must occur in the text.
    """
    if not answer:
        return "answer empty"
    if "?" in answer:
        return "answer asks"
    if not _COMPLETE.search(answer):
        return "answer cut off"
    if _repeats(answer):
        return "answer repeats itself"
    asked = content_stems(question)
    added = content_stems(answer) - asked
    if not added:
        return "answer adds nothing to the question"
    lines = [content_stems(line) for line in sentences(text)]
    supported = any(
        all(
            len(words & (line | following)) >= SUPPORT * len(words)
            for words in (added, asked | added)
        )
        for line, following in pairwise([*lines, set()])
    )
    named = name_stems(answer) <= content_stems(text)
    return None if supported and named else "answer without support"


def _repeats(text: str, run: int = 5) -> bool:
    """Return whether a run of words occurs twice."""
    words = [word.lower() for word in WORD.findall(text)]
    runs = Counter(tuple(words[i : i + run]) for i in range(len(words) - run + 1))
    return any(count > 1 for count in runs.values())
