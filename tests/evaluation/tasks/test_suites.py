"""Check suites: examples that fill their lengths, judgments, scores, and refusals."""

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from lwm.core.errors import ConfigError, InputError
from lwm.data.text.tokenizer import Tokenizer, train_tokenizer
from lwm.evaluation.report.scores import by_length, by_task, effective_length, points_of
from lwm.evaluation.results import Results
from lwm.evaluation.task import Case, evaluate
from lwm.evaluation.tasks.babilong import names_only
from lwm.evaluation.tasks.filler import Prose
from lwm.evaluation.tasks.question import most_units
from lwm.evaluation.tasks.ruler import string_match_all, string_match_part
from lwm.evaluation.tasks.ruler_qa import read_questions
from lwm.evaluation.tasks.suites import KEYS, TASKS, SuiteTask, choose_tasks, make_subtasks

SAYING = "the river ran past a quiet mill and few people in town could say how old it was"
WORDS = SAYING.split()
UNIT = {"niah_single_1": 90, "vt": 90, "passkey": 90, "number_string": 90, "kv_retrieval": 90,
        "niah_multikey_2": 90, "niah_multikey_3": 130, "cwe": 3 * 24, "fwe": 5 * 8,
        "qa_1": 260, "qa_2": 260}  # fmt: skip
"""Longest unit of filler in characters; 16 for other tasks, whose units are words."""


@cache
def text() -> str:
    draw = random.Random(0)
    sentences = [" ".join(draw.choices(WORDS, k=draw.randint(4, 14))) for _ in range(2500)]
    return " ".join(f"{sentence.capitalize()}." for sentence in sentences)


@cache
def tokenizer(kind: str) -> Tokenizer:
    if kind == "bpe":
        return train_tokenizer([text()], 400)
    # With one token for each character, no tokenizer needs more.
    vocabulary = {
        letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    backend.decoder = decoders.ByteLevel()  # type: ignore
    return Tokenizer(backend=backend)


def squad(path: Path, paragraphs: int = 150) -> Path:
    draw = random.Random(1)
    articles = [
        {
            "title": f"article {a}",
            "paragraphs": [
                {
                    "context": f"Town {a}-{p} was founded by clan {a}x{p}. "
                    + " ".join(draw.choices(WORDS, k=30)),
                    "qas": [
                        {
                            "question": f"Who founded town {a}-{p}?",
                            "answers": [{"text": f"clan {a}x{p}", "answer_start": 28}],
                        },
                        {"question": "Why?", "answers": [], "is_impossible": True},
                    ],
                }
                for p in range(paragraphs // 6)
            ],
        }
        for a in range(6)
    ]
    path.write_text(json.dumps({"version": "v2.0", "data": articles}))
    return path


def hotpot(path: Path) -> Path:
    entries = [
        {
            "question": f"Where does hero {i} live?",
            "answer": f"castle {i}",
            "context": [
                [f"Hero {i}", [f"Hero {i} serves lord {i}.", " He is old."]],
                [f"Lord {i}", [f"Lord {i} lives in castle {i}."]],
            ],
        }
        for i in range(120)
    ]
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("questions")
    return {
        "qa_1": read_questions(squad(folder / "squad.json")),
        "qa_2": read_questions(hotpot(folder / "hotpot.json")),
    }


def suite(name, files, kind="bpe", lengths=(4096,), samples=1, tasks=None, template="none"):
    names, _ = choose_tasks(name, tasks, files)
    return SuiteTask(
        suite=name,
        subtasks=make_subtasks(name, names, tokenizer(kind), [text()], files),
        tokenizer=tokenizer(kind),
        template=template,
        lengths=lengths,
        samples=samples,
    )


class Scripted:
    """Answer by a function of the case."""

    def __init__(self, answer) -> None:
        self._answer = answer

    def restart(self) -> None: ...

    def answer(self, cases: Sequence[Case]):
        return [self._answer(case) for case in cases]

    def follow(self, cases: Sequence[Case]):
        return [[True] * len(case.target) for case in cases]


@pytest.mark.parametrize(("kind", "length"), [("bpe", 2500), ("bpe", 6000), ("bytes", 9000)])
@pytest.mark.parametrize("name", TASKS)
def test_examples_fill_their_length_and_contain_their_answers(name, kind, length, files) -> None:
    task_suite = suite(name, files, kind, [length], samples=2)
    for unit in task_suite.units():
        for key in unit:
            case = task_suite.case(key)
            total = len(case.prompt) + case.max_tokens
            task = case.columns["task"]
            assert length - UNIT.get(task, 16) < total <= length, key
            prompt = tokenizer(kind).decode(case.prompt)
            context = prompt[: prompt.rindex(case.columns["question"][:10])]
            for answer in case.reference:
                often = context.lower().count(answer.lower())
                if task.startswith("niah") or task == "kv_retrieval":
                    assert often == 1
                elif task in ("passkey", "number_string"):
                    assert often == 2
                else:
                    assert often >= 1
            assert task_suite.case(key) == case
            response = tokenizer(kind).decode(case.target)
            assert np.all(task_suite.judge(case, response))


@pytest.mark.parametrize("template", ["original", "chatml"])
def test_template_tokens_count_towards_the_length(template, files) -> None:
    task_suite = suite("infinitebench", {}, lengths=[1200], template=template)
    for (key,) in task_suite.units():
        case = task_suite.case(key)
        assert 1200 - 90 < len(case.prompt) + case.max_tokens <= 1200
        assert "USER" in (said := tokenizer("bpe").decode(case.prompt)) or "|im_start|>" in said


@settings(max_examples=60)
@given(st.integers(0, 400), st.integers(1, 500), st.integers(0, 1000))
def test_most_units_is_the_largest_that_fits(least: int, budget: int, seed: int) -> None:
    steps = random.Random(seed).choices(range(1, 10), k=600)
    sums = [0]
    for step in steps:
        sums.append(sums[-1] + step)
    budget += sums[least]
    units = most_units(sums.__getitem__, budget, least, len(steps))
    assert units == max(n for n, total in enumerate(sums) if total <= budget)


@settings(max_examples=50)
@given(st.floats(0, 0.999), st.integers(0, 300), st.lists(st.floats(0, 1), max_size=6))
def test_hidden_sentences_keep_their_order(start: float, words: int, depths: list) -> None:
    prose = Prose(text()[:3000])
    words = min(words, len(prose))
    marks = [f"<{i}>" for i in range(len(depths))]
    hidden = prose.rotated(start).hiding(words, marks, sorted(depths)).split()
    assert [word for word in hidden if word in marks] == marks
    rest = [word for word in hidden if word not in marks]
    doubled = " ".join(prose.words * 2)
    assert " ".join(rest) in doubled
    assert len(rest) == words
    for place, (before, word) in enumerate(pairwise(hidden), 1):
        if word in marks and not set(marks).issuperset(hidden[place:]):  # not after the text
            assert before.endswith(".") or before in marks
    if words:
        assert rest[0][0].isupper()  # the beginning of a sentence


def test_ruler_tasks_follow_the_paper(files) -> None:
    task_suite = suite("ruler", files, lengths=[6000])
    cases = {str(unit[0]["task"]): task_suite.case(unit[0]) for unit in task_suite.units()}
    assert list(cases) == list(TASKS["ruler"])
    prompts = {task: tokenizer("bpe").decode(case.prompt) for task, case in cases.items()}
    needles = {
        task: len(re.findall(r"One of the special", text)) for task, text in prompts.items()
    }
    assert needles["niah_single_2"] == needles["niah_single_3"] == 1
    assert needles["niah_multikey_1"] == needles["niah_multivalue"] == 4
    assert needles["niah_multiquery"] == 4
    assert needles["niah_multikey_2"] > 20
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
                        cases["niah_multikey_3"].reference[0])  # fmt: skip
    assert [len(cases[task].reference) for task in ("niah_multivalue", "niah_multiquery")] == [
        4,
        4,
    ]
    assert {task: case.max_tokens for task, case in cases.items() if len(case.target) < 30} == {
        task: 128 if task.startswith("niah") else {"vt": 30, "cwe": 120, "fwe": 50}.get(task, 32)
        for task, case in cases.items()
        if len(case.target) < 30
    }

    # Follow the assignments of the text after the solved example.
    context = prompts["vt"].split("Memorize and track")[-1]
    value = re.search(r"assigned the value (\d+) in", context)
    assert value
    holders = {value[1]}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", context):
        if source in holders:
            holders.add(name)
    assert holders - {value[1]} == set(cases["vt"].reference)
    assert len(cases["vt"].reference) == 5

    # Count the words of the last list, and the coded words except the dots.
    context = prompts["cwe"].split("Below is a numbered list")[-1].split("Question:")[0]
    counted = Counter(re.findall(r"\d+\. ([\w-]+)", context))
    assert {word for word, _ in counted.most_common(10)} == set(cases["cwe"].reference)
    assert set(counted.values()) == {30, 3}
    context = prompts["fwe"].split("frequently appeared coded words.")[1].split("\nQuestion:")[0]
    counted = Counter(context.split())
    assert [word for word, _ in counted.most_common(4)] == ["...", *cases["fwe"].reference]


@pytest.mark.parametrize(
    ("answers", "response", "share"),
    [
        # `outputs` and `pred` of RULER's prediction files.
        (["8090293"], " 8090293.", 1.0),
        (["8090293"], " 809029", 0.0),
        (["1111111", "2222222", "3333333", "4444444"], "2222222, 4444444 and 5555555", 0.5),
        (["AB", "CD", "EF"], "ab\x00cd", 2 / 3),
        (["word"], "", 0.0),
    ],
)
def test_string_match_all(answers: list, response: str, share: float) -> None:
    verdict = string_match_all(answers, {}, response)
    each = [verdict] if isinstance(verdict, bool) else verdict
    assert sum(each) / len(each) == pytest.approx(share)
    assert [answer.lower() in response.lower() for answer in answers] == list(each)


def test_string_match_part_accepts_any_answer() -> None:
    assert string_match_part(["Denver Broncos", "Broncos"], {}, "the broncos won")
    assert not string_match_part(["Denver Broncos", "Broncos"], {}, "the Panthers")


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("The most recent location of Mary is garden.", True),
        ("GARDEN", True),
        ("kitchen. No: garden", False),  # only the first sentence counts
        ("the garden or the kitchen", False),
        ("She went from the office to the garden", True),  # the question names the office
        ("the yard", False),
        ("", False),
    ],
)
def test_babilong_accepts_only_the_answer(response: str, correct: bool) -> None:
    labels = ("garden", "kitchen", "office")
    assert names_only("garden", response, labels, "Where was Mary before the office?") is correct


def test_infinitebench_judgments() -> None:
    task_suite = suite("infinitebench", {}, lengths=[800])
    passkey, _, pairs = (task_suite.case(unit[0]) for unit in task_suite.units())
    key, value = passkey.reference[0], pairs.reference[0]
    for response, right in ((f"It is {key}, not 12", 1), (f"12 or {key}", 0), ("none", 0),
                            (f"{key}0", 0), (f"x{key}x", 1)):  # fmt: skip
        assert task_suite.judge(passkey, response) == right
    for response, right in ((f'"{value}"}}', 1), (f"is:{value}.", 1), (value[:-1], 0),
                            (f"{value}0", 0)):  # fmt: skip
        assert task_suite.judge(pairs, response) == right


@pytest.mark.parametrize("name", TASKS)
def test_right_answers_score_everything(name, files, tmp_path: Path) -> None:
    task_suite = suite(name, files, lengths=[2500, 4000])
    scripted = Scripted(lambda case: " and ".join(case.reference))
    rows = evaluate(task_suite, scripted, Results(tmp_path, {}, KEYS))
    assert len(rows) == 2 * len(TASKS[name])
    points = points_of(rows)
    assert set(by_length(points).values()) == {1.0}
    assert effective_length(points, 100.0) == 4000
    assert evaluate(task_suite, Scripted(lambda case: 1 / 0), Results(tmp_path, {}, KEYS)) == rows


def test_random_answers_score_at_chance_level(files, tmp_path: Path) -> None:
    draw = random.Random(5)
    places = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
    samples = 40
    task_suite = suite("babilong", {}, lengths=[1500], samples=samples, tasks="qa1,qa4")
    rows = evaluate(
        task_suite, Scripted(lambda case: draw.choice(places)), Results(tmp_path / "1", {}, KEYS)
    )
    scores = by_task(points_of(rows))
    for task in ("qa1", "qa4"):  # three standard deviations
        assert abs(scores[task, 1500] - 1 / 6) < 3 * (5 / 36 / samples) ** 0.5

    task_suite = suite("ruler", {}, lengths=[1500], samples=samples, tasks="niah_multikey_2")
    shares = []

    def guess(case: Case) -> str:
        values = re.findall(r" is: (\d{7})\.", tokenizer("bpe").decode(case.prompt))
        shares.append(1 / len(values))
        return draw.choice(values)

    rows = evaluate(task_suite, Scripted(guess), Results(tmp_path / "2", {}, KEYS))
    chance = sum(shares) / len(shares)
    score = by_task(points_of(rows))["niah_multikey_2", 1500]
    assert abs(score - chance) < 3 * (chance * (1 - chance) / samples) ** 0.5


def test_effective_length() -> None:
    rows = [
        {"task": task, "context_length": length, "seed": 0, "score": score}
        for length, scores in {1000: (1.0, 0.9), 2000: (0.9, 0.812), 4000: (1.0, 0.5)}.items()
        for task, score in zip("ab", scores, strict=True)
    ]
    points = points_of(rows)
    assert by_length(points) == pytest.approx({1000: 0.95, 2000: 0.856, 4000: 0.75})
    assert effective_length(points, 85.6) == 2000
    assert effective_length(points, 75.0) == 4000
    assert effective_length(points, 96.0) is None


def test_impossible_examples_are_refused(files, tmp_path: Path) -> None:
    short = make_subtasks("ruler", ["niah_single_2"], tokenizer("bytes"), [text()[:2000]], {})
    task_suite = SuiteTask(
        suite="ruler", subtasks=short, tokenizer=tokenizer("bytes"), template="none",
        lengths=[5000], samples=1,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"niah_single_2 2,\d{3} tokens.* 5,000;"):
        task_suite.require_fit()
    with pytest.raises(InputError, match=r"cwe takes at least [\d,]+ tokens .* is 200;"):
        suite("ruler", {}, tasks="cwe", lengths=[200]).require_fit()
    with pytest.raises(InputError, match=r"squad\.json gives qa_1 .* is 100,000;"):
        suite("ruler", files, tasks="qa_1", lengths=[100_000]).require_fit()
    with pytest.raises(ConfigError, match="no task 'qa9'"):
        choose_tasks("babilong", "qa1,qa9", ())
    with pytest.raises(ConfigError, match="--squad"):
        choose_tasks("ruler", "vt,qa_1", ())
    assert choose_tasks("ruler", None, ["qa_1"])[1] == {"qa_2": "no --hotpot"}


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("", "SQuAD"),
        ("{", "SQuAD"),
        ('{"data": 3}', "data: "),
        ('{"data": [{"paragraphs": [{"context": 1, "qas": []}]}]}', "data.0.paragraphs.0.context"),
        ('[{"question": "q", "context": []}]', "0.answer"),
        ('{"data": []}', "no question"),
    ],
)
def test_broken_question_files_are_refused(written: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "asked.json"
    path.write_text(written)
    with pytest.raises(InputError, match=named) as caught:
        read_questions(path)
    assert str(path) in str(caught.value)
    with pytest.raises(InputError, match="missing"):
        read_questions(tmp_path / "missing.json")
