"""RULER's two question-answering tasks: a paragraph with the answer among many without it.

Hsieh et al. 2024 (arXiv 2404.06654). Questions come from files in SQuAD's format (Rajpurkar et al.
2016, arXiv 1606.05250) or HotpotQA's (Yang et al. 2018, arXiv 1809.09600); documents that surround
a question's own are, as in NVIDIA/RULER, first those of the same article, then any.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import pydantic

from lwm.core.errors import InputError
from lwm.evaluation.tasks.ruler import string_match_part
from lwm.evaluation.tasks.sizing import Question
from lwm.evaluation.tasks.subtask import Subtask

MAX_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question about documents, which are known by their numbers.

    Args:
        answers: any of them will do.
        needed: documents with the answer.
        near: further ones of the same article.
    """

    question: str
    answers: Sequence[str]
    needed: Sequence[int]
    near: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Questions:
    """A file of questions, and all its documents, each once."""

    path: Path
    documents: Sequence[str]
    asked: Sequence[Asked]


def read_questions(path: Path) -> Questions:
    """Questions that have an answer, from SQuAD's JSON (an object with `data`) or HotpotQA's (a
    list).

    Raises:
        InputError: the file cannot be read, is of neither format, or asks nothing.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} is larger than {MAX_BYTES >> 20} MB; cut it into parts")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from error
    hotpot = data.lstrip()[:1] == b"["
    form = pydantic.TypeAdapter(list[_Hotpot] if hotpot else _Squad)
    try:
        found = form.validate_json(data)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{path} is no file of questions in "
            f"{'HotpotQA' if hotpot else 'SQuAD'}'s format: {f'{where}: ' if where else ''}"
            f"{first['msg']}; repair or replace it"
        ) from error
    questions = _of_hotpot(path, found) if isinstance(found, list) else _of_squad(path, found)
    if not questions.asked:
        raise InputError(f"{path} holds no question with an answer; name another file")
    return questions


def qa(questions: Questions) -> Subtask:
    """The task of a file's questions."""
    return Subtask(make=partial(_make, questions), judge=string_match_part)


_REQUEST = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)


def _make(questions: Questions, random: Random, length: int) -> Question:
    asked = random.choice(questions.asked)
    own = {*asked.needed, *asked.near}
    others = [number for number in range(len(questions.documents)) if number not in own]
    numbers = [
        *asked.needed,
        *random.sample(asked.near, len(asked.near)),
        *random.sample(others, len(others)),
    ]
    place = {number: random.random() for number in numbers}

    def context(count: int) -> str:
        chosen = sorted(numbers[:count], key=place.__getitem__)
        return "\n\n".join(
            f"Document {at}:\n{questions.documents[number]}" for at, number in enumerate(chosen, 1)
        )

    return Question(
        before=f"{_REQUEST}\n\nThe following are given documents.\n\n",
        after=f"\n\n{_REQUEST}\n\nQuestion: {asked.question}",
        answer_prefix=" Answer:",
        context=context,
        answers=asked.answers,
        ideal=asked.answers[0],
        max_tokens=32,
        least=len(asked.needed),
        most=len(numbers),
        source=f"file {questions.path}",
        told={"question": asked.question},
    )


# Of files from elsewhere only what is used here is looked at.
@dataclass
class _Answer:
    text: str


@dataclass
class _Entry:
    question: str
    answers: list[_Answer]
    is_impossible: bool = False  # only since SQuAD 2.0


@dataclass
class _Paragraph:
    context: str
    qas: list[_Entry]


@dataclass
class _Article:
    paragraphs: list[_Paragraph]


@dataclass
class _Squad:
    data: list[_Article]


@dataclass
class _Hotpot:
    question: str
    answer: str
    context: list[tuple[str, list[str]]]


def _numbers(documents: Sequence[str]) -> Mapping[str, int]:
    return {document: number for number, document in enumerate(dict.fromkeys(documents))}


def _of_squad(path: Path, found: _Squad) -> Questions:
    number = _numbers([p.context for article in found.data for p in article.paragraphs])
    asked = []
    for article in found.data:
        here = list(dict.fromkeys(number[p.context] for p in article.paragraphs))
        for paragraph in article.paragraphs:
            own = number[paragraph.context]
            for entry in paragraph.qas:
                answers = list(dict.fromkeys(a.text for a in entry.answers if a.text.strip()))
                if answers and not entry.is_impossible:
                    near = [other for other in here if other != own]
                    asked.append(
                        Asked(question=entry.question, answers=answers, needed=[own], near=near)
                    )
    return Questions(path=path, documents=list(number), asked=asked)


def _of_hotpot(path: Path, found: Sequence[_Hotpot]) -> Questions:
    texts = [[f"{title}\n{''.join(told)}" for title, told in entry.context] for entry in found]
    number = _numbers([text for several in texts for text in several])
    return Questions(
        path=path,
        documents=list(number),
        asked=[
            Asked(
                question=entry.question,
                answers=[entry.answer],
                needed=list(dict.fromkeys(number[text] for text in several)),
            )
            for entry, several in zip(found, texts, strict=True)
            if entry.answer.strip() and several
        ],
    )
