"""RULER's procedural tasks: eight of needles, variables to trace, words that are common.

Hsieh et al. 2024 (arXiv 2404.06654); templates, beginnings of answers, numbers of tokens to
generate, task settings and scores are those of NVIDIA/RULER (scripts/synthetic.yaml). Differences:
the essays are the user's text, and it is not repeated where it is too short; keys are compounds of
our own words; words of `cwe` are ours and the text's; keys of one example never coincide.
"""

import math
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice, pairwise
from random import Random
from typing import Any

from lwm.data.text.tokenizer import Tokenizer
from lwm.evaluation.case import Verdict
from lwm.evaluation.tasks.infinitebench import NOISE
from lwm.evaluation.tasks.sizing import Prose, Question, fullest, scattered
from lwm.evaluation.tasks.subtask import Subtask
from lwm.evaluation.tasks.words import different, plain_words, random_uuid

TASKS = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2",
    "niah_multikey_3", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
)  # fmt: skip

_DEPTHS = [step / 39 for step in range(40)]
_SHORT = 4096  # below it, lists of common words are shorter
_HOPS = 4
_EXAMPLE = 500  # tokens of the solved example that `vt` begins with


def ruler(prose: Prose, tokenizer: Tokenizer) -> dict[str, Subtask]:
    """The eleven procedural tasks by name.

    Args:
        prose: in the essays' place.
        tokenizer: sizes the solved example of `vt`, and tells how many words `cwe` needs.
    """
    words = plain_words(prose.words)
    sample = Random(0).sample(words, 100)
    entry = len(tokenizer.encode(_numbered(sample), specials=False)) / len(sample)
    essay, needle = partial(_niah, prose), partial(_niah, None)
    makes = {
        "niah_single_1": partial(needle, filler="noise"),
        "niah_single_2": essay,
        "niah_single_3": partial(essay, values="uuids"),
        "niah_multikey_1": partial(essay, num_keys=4),
        "niah_multikey_2": partial(needle, filler="needles"),
        "niah_multikey_3": partial(needle, filler="needles", keys="uuids", values="uuids"),
        "niah_multivalue": partial(essay, num_values=4),
        "niah_multiquery": partial(essay, num_keys=4, num_queries=4),
        "vt": partial(_variables, tokenizer),
        "cwe": partial(_common_words, words, entry),
        "fwe": _frequent_words,
    }
    return {name: Subtask(make=make, judge=string_match_all) for name, make in makes.items()}


def string_match_all(answers: Sequence[str], told: Mapping[str, Any], response: str) -> Verdict:
    """The share of the answers that the response holds, whatever their case."""
    said = _printable(response)
    found = [answer.lower() in said for answer in answers]
    correct = found[0] if len(found) == 1 else found
    return Verdict(correct=correct, score=sum(found) / len(found))


def string_match_part(answers: Sequence[str], told: Mapping[str, Any], response: str) -> Verdict:
    """Whether the response holds one of the answers, whatever its case."""
    said = _printable(response)
    correct = any(answer.lower() in said for answer in answers)
    return Verdict(correct=correct, score=float(correct))


def _printable(response: str) -> str:
    return re.sub(r"[\x00-\x1f]", "\n", response.strip()).strip().lower()


def _niah(
    prose: Prose | None,
    random: Random,
    length: int,
    *,
    filler: str = "essay",
    keys: str = "words",
    values: str = "numbers",
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
) -> Question:
    """Needles: sentences that give a value to a key, of which some keys are asked.

    Args:
        prose: what an `essay` is of; None where `filler` is `noise` or `needles`.
    """
    names, drawn = _DRAWS[keys](random), _DRAWS[values](random)

    def needle(key: str, value: str) -> str:
        return f"One of the special magic {values} for {key} is: {value}."

    given = [(next(names), list(islice(drawn, num_values))) for _ in range(num_keys)]
    needles = [needle(key, value) for key, several in given for value in several]
    random.shuffle(needles)
    asked = random.sample(given, num_queries)
    answers = [value for _, several in asked for value in several]
    query = _listed([key for key, _ in asked])
    if prose is not None:
        depths = sorted(random.sample(_DEPTHS, len(needles)))
        context = partial(prose.hiding, sentences=needles, depths=depths)
    else:
        depths = sorted(random.random() for _ in needles)
        lines: list[str] = []

        def context(count: int) -> str:
            while len(lines) < count:
                noise = filler == "noise"
                lines.append(NOISE if noise else needle(next(names), next(drawn)))
            return "\n".join(scattered(needles, lines[:count], depths))

    if len(answers) == 1:
        some, what, are, which = "A", values[:-1], "is", "is"
    else:
        some, what, are, which = "Some", values, "are", "are all"
    told = f"the special magic {what} for {query} mentioned in the provided text"
    question = f"What {which} {told}?"
    return Question(
        before=f"{some} special magic {what} {are} hidden within the following text. Make sure to "
        f"memorize it. I will quiz you about the {what} afterwards.\n",
        after=f"\n{question}",
        answer_prefix=f" The{told.removeprefix('the')} {are}",
        context=context,
        answers=answers,
        ideal=_listed(answers) + ".",
        max_tokens=128,
        least=0 if prose else 1,
        most=None if prose is None else len(prose),
        told={"question": question},
    )


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, and {words[-1]}"


def _unlike(draw: Callable[[Random], str], random: Random) -> Iterator[str]:
    """Draws without end, none twice."""
    given: set[str] = set()
    while True:
        one = draw(random)
        if one not in given:
            given.add(one)
            yield one


_DRAWS: Mapping[str, Callable[[Random], Iterator[str]]] = {
    "words": lambda random: different(random, ()),
    "numbers": partial(_unlike, lambda random: str(random.randint(10**6, 10**7 - 1))),
    "uuids": partial(_unlike, random_uuid),
}


_TRACE = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"


def _variables(tokenizer: Tokenizer, random: Random, length: int) -> Question:
    """`vt`: a value handed from variable to variable; all that have it are asked. A solved example
    of about 500 tokens goes before."""
    solved = _chain(random, letters=3)

    def example(lines: int) -> str:
        asked = f"{_TRACE}{solved.context(lines)}{solved.after}{solved.answer_prefix}"
        return f"{asked} {solved.ideal}\n\n"

    def tokens(lines: int) -> int:
        return len(tokenizer.encode(example(lines), specials=False))

    least = solved.least
    lines = least if tokens(least) > _EXAMPLE else fullest(tokens, _EXAMPLE, least, _EXAMPLE)
    return _chain(random, letters=5, before=example(lines))


def _chain(random: Random, letters: int, before: str = "") -> Question:
    names = _unlike(lambda r: "".join(r.choices(string.ascii_uppercase, k=letters)), random)
    chain = list(islice(names, _HOPS + 1))
    value = random.randint(10_000, 99_999)
    lines = [f"VAR {chain[0]} = {value}"]
    lines += [f"VAR {new} = VAR {old} " for old, new in pairwise(chain)]
    depths = sorted(random.random() for _ in lines)
    question = f"Find all variables that are assigned the value {value} in the text above."
    return Question(
        before=before + _TRACE,
        after=f"\nQuestion: {question}",
        answer_prefix=" Answer: According to the chain(s) of variable assignment in the text "
        f"above, {len(chain)} variables are assigned the value {value}, they are: ",
        context=lambda noises: "\n".join(scattered(lines, [NOISE] * noises, depths)),
        answers=chain,
        ideal=" ".join(chain),
        max_tokens=30,
        least=1,
        told={"question": question},
    )


_COMMON = 10
_COUNT = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_MOST_COMMON = "What are the 10 most common words in the above list?"
_TOP = " Answer: The top 10 words that appear most often in the list are:"


def _common_words(words: Sequence[str], entry: float, random: Random, length: int) -> Question:
    """`cwe`: a numbered list in which ten words come often and the others seldom. A solved example
    goes before.

    Args:
        entry: tokens that a word and its number take.
    """
    often, seldom = (6, 1) if length < _SHORT else (30, 3)
    # A list that would use up the words is of compounds alone, so that the ten do not stand out.
    drawn = different(random, words if length / (entry * seldom) < len(words) else ())
    example = (20, 3, 1) if length < _SHORT else (40, 10, 3)
    shown = list(islice(drawn, example[0]))
    common = list(islice(drawn, _COMMON))
    order = random.getrandbits(64)
    rare: list[str] = []

    def context(count: int) -> str:
        rare.extend(islice(drawn, max(0, count - len(rare))))
        return _list_of(common, rare[:count], often, seldom, Random(order))

    solved = _list_of(shown[:_COMMON], shown[_COMMON:], *example[1:], random)
    return Question(
        before=f"{_COUNT}{solved}\nQuestion: {_MOST_COMMON}{_TOP} {_numbered(shown[:_COMMON])}\n"
        f"{_COUNT}",
        after=f"\nQuestion: {_MOST_COMMON}",
        answer_prefix=_TOP,
        context=context,
        answers=common,
        ideal=_numbered(common),
        max_tokens=120,
        least=_COMMON,
        told={"question": _MOST_COMMON},
    )


def _list_of(
    common: Sequence[str], rare: Sequence[str], often: int, seldom: int, random: Random
) -> str:
    words = [*common] * often + [*rare] * seldom
    random.shuffle(words)
    return _numbered(words)


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


_CODED = 6  # letters of a coded word
_FEWEST = 53  # from here on the fourth word comes more often than the fifth, whatever the rounding


def _frequent_words(random: Random, length: int) -> Question:
    """`fwe`: made-up words whose frequencies fall with the square of their rank (a zeta
    distribution of alpha 2), the first of them dots that are to be ignored."""
    drawn = _unlike(lambda r: "".join(r.choices(string.ascii_lowercase, k=_CODED)), random)
    kinds = max((length - 50) // 50, 5)
    words = ["...", *islice(drawn, kinds - 1)]
    order = random.getrandbits(64)

    def context(count: int) -> str:
        shares = (int(count * 6 / math.pi**2 / rank**2) for rank in range(1, kinds + 1))
        text = [word for word, share in zip(words, shares, strict=True) for _ in range(share)]
        Random(order).shuffle(text)
        return " ".join(text)

    question = "What are the three most frequently appeared words in the above coded text?"
    return Question(
        before="Read the following coded text and track the frequency of each coded word. Find "
        "the three most frequently appeared coded words. ",
        after="\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        f"{question}",
        answer_prefix=" Answer: According to the coded text above, the three most frequently "
        "appeared words are:",
        context=context,
        answers=words[1:4],
        ideal=_listed(words[1:4]) + ".",
        max_tokens=50,
        least=_FEWEST,
        told={"question": question},
    )
