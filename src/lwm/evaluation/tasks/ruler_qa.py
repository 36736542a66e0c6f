"""Make RULER's two question-answering tasks: a document with the answer among others.

Source: Hsieh et al. 2024 (arXiv 2404.06654). Questions come from files in the format of SQuAD
(Rajpurkar et al. 2016, arXiv 1606.05250) or HotpotQA (Yang et al. 2018, arXiv 1809.09600). As in
NVIDIA/RULER, the other documents are first those of the same article, then any.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import pydantic

from lwm.core.config import first_fault
from lwm.core.errors import InputError
from lwm.evaluation.tasks.question import Question, Subtask
from lwm.evaluation.tasks.ruler import string_match_part

_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class _DocumentQuestion:
    question: str
    answers: Sequence[str]  # each of them is right
    needed: Sequence[int]  # indices of the documents with the answer
    near: Sequence[int] = ()  # other documents of the same article


@dataclass(frozen=True)
class QuestionFile:
    """Hold a file of questions and its distinct documents."""

    path: Path
    documents: Sequence[str]
    questions: Sequence[_DocumentQuestion]


def read_questions(path: Path) -> QuestionFile:
    """Read questions from SQuAD's or HotpotQA's JSON; raise InputError if there are none."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} is larger than {_MAX_BYTES >> 20} MB; cut it into parts")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from error
    is_hotpot = data.lstrip()[:1] == b"["
    schema = pydantic.TypeAdapter(list[_Hotpot] if is_hotpot else _Squad)
    try:
        content = schema.validate_json(data)
    except pydantic.ValidationError as error:
        form = "HotpotQA" if is_hotpot else "SQuAD"
        raise InputError(
            f"{path} is not a file of questions in {form}'s format: "
            f"{first_fault(error.errors())}; repair or replace it"
        ) from error
    is_list = isinstance(content, list)
    documents, questions = _read_hotpot(content) if is_list else _read_squad(content)
    if not questions:
        raise InputError(f"{path} has no question with an answer; name another file")
    return QuestionFile(path, documents, questions)


def document_task(file: QuestionFile) -> Subtask:
    """Return the task of a file's questions."""
    return Subtask(make=partial(_make, file), judge=string_match_part)


_REQUEST = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)


def _make(file: QuestionFile, random: Random, length: int) -> Question:
    chosen = random.choice(file.questions)
    article = {*chosen.needed, *chosen.near}
    others = [index for index in range(len(file.documents)) if index not in article]
    indices = [
        *chosen.needed,
        *random.sample(chosen.near, len(chosen.near)),
        *random.sample(others, len(others)),
    ]
    position = {index: random.random() for index in indices}

    def context(count: int) -> str:
        shown = sorted(indices[:count], key=position.__getitem__)
        return "\n\n".join(
            f"Document {number}:\n{file.documents[index]}" for number, index in enumerate(shown, 1)
        )

    return Question(
        before=f"{_REQUEST}\n\nThe following are given documents.\n\n",
        after=f"\n\n{_REQUEST}\n\nQuestion: {chosen.question}",
        answer_prefix=" Answer:",
        context=context,
        answers=chosen.answers,
        ideal=chosen.answers[0],
        max_tokens=32,
        least=len(chosen.needed),
        most=len(indices),
        source=f"file {file.path}",
        columns={"question": chosen.question},
    )


# Schemas of the fields that are used; files have more.


@dataclass
class _Answer:
    text: str


@dataclass
class _Entry:
    question: str
    answers: list[_Answer]
    is_impossible: bool = False  # since SQuAD 2.0


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


def _index(documents: Sequence[str]) -> Mapping[str, int]:
    return {document: index for index, document in enumerate(dict.fromkeys(documents))}


def _read_squad(content: _Squad) -> tuple[list[str], list[_DocumentQuestion]]:
    index = _index([p.context for article in content.data for p in article.paragraphs])
    questions = []
    for article in content.data:
        article_documents = list(dict.fromkeys(index[p.context] for p in article.paragraphs))
        for paragraph in article.paragraphs:
            document = index[paragraph.context]
            near = [other for other in article_documents if other != document]
            for entry in paragraph.qas:
                answers = list(dict.fromkeys(a.text for a in entry.answers if a.text.strip()))
                if answers and not entry.is_impossible:
                    questions.append(_DocumentQuestion(entry.question, answers, [document], near))
    return list(index), questions


def _read_hotpot(content: Sequence[_Hotpot]) -> tuple[list[str], list[_DocumentQuestion]]:
    documents = [
        [f"{title}\n{''.join(sentences)}" for title, sentences in entry.context]
        for entry in content
    ]
    index = _index([text for texts in documents for text in texts])
    questions = [
        _DocumentQuestion(
            entry.question, [entry.answer], list(dict.fromkeys(index[text] for text in texts))
        )
        for entry, texts in zip(content, documents, strict=True)
        if entry.answer.strip() and texts
    ]
    return list(index), questions
