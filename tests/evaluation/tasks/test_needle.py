"""Check needles: their places, exact lengths, judgments, and runs that resume."""

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from lwm.cli.ranges import parse_depths, parse_lengths
from lwm.core.errors import ConfigError, InputError
from lwm.data.text.tokenizer import Tokenizer, read_tokenizer, train_tokenizer
from lwm.evaluation.results import Results, read_results
from lwm.evaluation.task import Case, evaluate
from lwm.evaluation.tasks.haystack import read_haystack, read_texts
from lwm.evaluation.tasks.needle import CITIES, RESERVED, NeedleTask

SAYING = "the river ran past a quiet mill and few people in town could say how old it was"
WORDS = SAYING.split()


@cache
def prose() -> str:
    draw = random.Random(0)
    sentences = [" ".join(draw.choices(WORDS, k=draw.randint(4, 14))) for _ in range(4000)]
    return " ".join(f"{sentence.capitalize()}." for sentence in sentences)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("haystack") / "prose.txt"
    path.write_text(prose(), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    if request.param == "bytes":
        return train_tokenizer([prose()], 400)
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(  # Llama's way
        sentence_iterator=iter(f"{line}." for line in prose().split(".")[:500]),
        model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=420,
        byte_fallback=True, normalization_rule_name="identity", split_digits=True,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=9,
    )  # fmt: skip
    return read_tokenizer(folder / "tokenizer.model")


def task_of(file: Path, tokenizer: Tokenizer, **settings: object) -> NeedleTask:
    arguments = {"lengths": [700, 1500], "depths": [0.0, 33.3, 50.0, 100.0]} | settings
    haystack = read_haystack(str(file), tokenizer, 20_000)
    return NeedleTask(tokenizer=tokenizer, haystack=haystack, **arguments)  # type: ignore[arg-type]


def context_of(case: Case, tokenizer: Tokenizer) -> str:
    """Return the document in a prompt."""
    text = tokenizer.decode(case.prompt)
    return text[text.index("USER: ") + len("USER: ") : text.rindex("What ")]


def squeezed(text: str) -> str:
    """Remove the space that sentencepiece puts before each separately encoded part."""
    return re.sub(r" *\n *", "\n", re.sub(" +", " ", text))


@given(
    length=st.integers(320, 3000),
    depth=st.integers(0, 1000).map(lambda n: n / 10),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=40)
def test_a_needle_follows_the_sentence_of_its_depth(
    file: Path, tokenizer: Tokenizer, length: int, depth: float, seed: int
) -> None:
    task = task_of(file, tokenizer, lengths=[length], depths=[depth], seed=seed)
    ((key,),) = task.units()
    case = task.case(key)
    assert case == task.case(key)
    assert case.columns["context_tokens"] == length - RESERVED
    text = context_of(case, tokenizer)
    assert text.count(case.reference) == 1
    assert re.fullmatch(r"[1-9]\d{6}", case.reference)
    # The words before the needle, tokenized again, end a sentence that reaches the depth.
    before, _, after = text.partition("The special magic")
    rest = after.partition(case.reference)[2]
    assert depth > 0 or not before.strip()
    assert depth < 100 or not rest.strip()
    whole = len(tokenizer.encode(before, specials=False)) + len(
        tokenizer.encode(rest, specials=False)
    )
    reached = len(tokenizer.encode(before, specials=False))
    if 0 < depth < 100:
        assert not before.strip() or before.rstrip().endswith(".")
        sentence = re.match(r"[^.]*\.?", rest.lstrip())
        assert sentence
        longest = len(tokenizer.encode(sentence.group(), specials=False))
        wanted = whole * depth / 100
        assert reached <= wanted + 3
        assert wanted <= reached + longest + 4 or not rest.strip()


@given(length=st.integers(900, 2000), seed=st.integers(0, 10_000), count=st.integers(1, 6))
@settings(max_examples=25)
def test_each_of_several_needles_occurs_once(
    file: Path, tokenizer: Tokenizer, length: int, seed: int, count: int
) -> None:
    task = task_of(
        file, tokenizer, lengths=[length], needles=count, retrieved=(count + 1) // 2, seed=seed
    )
    case = task.case(task.units()[0][0])
    text = context_of(case, tokenizer)
    hidden = dict(re.findall(r"The special magic (\w+) number is: (\d{7})", text))
    assert len(hidden) == count
    assert len(set(hidden.values())) == count
    asked = [city for city in hidden if city in case.columns["question"]]
    assert sorted(hidden[city] for city in asked) == sorted(case.reference)
    assert case.columns["context_tokens"] == length - RESERVED
    assert len(case.columns["depth_percent"]) == len(case.reference)


def test_each_needle_of_one_text_is_asked_for(file: Path, tokenizer: Tokenizer) -> None:
    depths = [0.0, 33.3, 50.0, 100.0]
    task = task_of(file, tokenizer, depths=depths, together=True, rounds=2)
    units = task.units()
    assert len(units) == 4
    texts = set()
    for unit in units:
        cases = [task.case(key) for key in unit]
        (text,) = {context_of(case, tokenizer) for case in cases}
        texts.add(text)
        hidden = re.findall(r"The special magic (\w+) number is: (\d{7})", text)
        assert [case.reference for case in cases] == [number for _, number in hidden]
        for case, (city, _) in zip(cases, hidden, strict=True):
            assert case.columns["question"] == f"What is the special magic {city} number?"
            assert case.columns["context_tokens"] == int(unit[0]["context_length"]) - RESERVED
    assert len(texts) == 4
    with pytest.raises(ConfigError, match="too short for 4 needles"):
        task_of(file, tokenizer, lengths=[500], depths=depths, together=True)


def test_the_prompt_is_that_of_the_original_scripts(file: Path, tokenizer: Tokenizer) -> None:
    task = task_of(file, tokenizer, depths=[100.0])
    case = task.case(task.units()[0][0])
    text = squeezed(tokenizer.decode(case.prompt))
    city = case.columns["question"].split()[-2]
    assert text.startswith("You are a helpful assistant. USER: ")
    assert text.endswith(
        f"\nThe special magic {city} number is: {case.reference}\nWhat is the special magic "
        f"{city} number? Don't give information outside the document or repeat your findings. "
        "Keep your response short and direct. ASSISTANT: "
    )
    three = task_of(file, tokenizer, needles=3, retrieved=3)
    question = three.case(three.units()[0][0]).columns["question"]
    assert re.fullmatch(r"What are the special magic numbers for \w+, \w+, and \w+\?", question)
    one = task_of(file, tokenizer, needles=3, retrieved=1)
    question = one.case(one.units()[0][0]).columns["question"]
    assert re.fullmatch(r"What is the special magic number for \w+\?", question)
    assert len(set(CITIES)) == len(CITIES) >= 60


@pytest.mark.parametrize(
    ("reference", "response", "correct"),
    [
        ("1234567", "The special magic Oslo number is: 1234567.", True),
        ("1234567", "1234567", True),
        ("1234567", "It is 123 4567.", False),
        ("1234567", "", False),
        ("1234567", "7654321 or 1234567", True),
        (["1234567", "7654321"], "1234567 and 7654321", [True, True]),
        (["1234567", "7654321"], "7654321", [False, True]),
        (["1234567", "7654321"], "I do not know.", [False, False]),
    ],
)
def test_verdicts(file: Path, reference: object, response: str, correct: object) -> None:
    task = task_of(file, train_tokenizer([prose()], 400))
    case = Case(prompt=[1], target=[1], max_tokens=1, reference=reference)
    assert task.judge(case, response) == correct


class Scripted:
    """Answer by a function of the case; stop after a number of answers as Ctrl-C does."""

    def __init__(self, answers: object, stop_after: int = 10**9) -> None:
        self._answers, self._left = answers, stop_after

    def restart(self) -> None: ...

    def answer(self, cases: Sequence[Case]) -> Iterator[str]:
        for case in cases:
            if not self._left:
                raise KeyboardInterrupt
            self._left -= 1
            yield self._answers(case)  # type: ignore[operator]

    def follow(self, cases: Sequence[Case]) -> Iterable[list[bool]]:
        return [self._answers(case) for case in cases]  # type: ignore[operator]


KEYS = ("context_length", "depth_percent", "seed")


def test_right_answers_score_everything_and_guesses_nothing(
    file: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    task = task_of(file, tokenizer, rounds=3)
    draw = random.Random(0)
    rows = evaluate(
        task, Scripted(lambda case: f"It is {case.reference}"), Results(tmp_path / "a", {}, KEYS)
    )
    assert len(rows) == 2 * 4 * 3
    assert all(row["correct"] is True and row["score"] == 1 for row in rows)
    rows = evaluate(
        task,
        Scripted(lambda case: str(draw.randrange(10**6, 10**7))),
        Results(tmp_path / "b", {}, KEYS),
    )
    assert sum(row["score"] for row in rows) == 0  # once in nine million
    several = task_of(file, tokenizer, needles=4, retrieved=4, rounds=40)
    # It names one of the four, a quarter.
    guess = Scripted(lambda case: draw.choice(case.reference))
    rows = evaluate(several, guess, Results(tmp_path / "c", {}, ("context_length", "seed")))
    assert np.mean([row["score"] for row in rows]) == 0.25


def test_logits_are_scored_on_the_numbers_only(
    file: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    task = task_of(file, tokenizer, needles=3, retrieved=2, lengths=[1000], by_logits=True)
    case = task.case(task.units()[0][0])
    first, second = case.answer_spans
    numbers = [
        tokenizer.decode([case.target[i] for i in part]).strip() for part in case.answer_spans
    ]
    assert numbers == case.reference
    # The target equals the whole answer tokenized in one piece, except its beginning.
    cities = re.findall(r"for (\w+), and (\w+)\?", case.columns["question"])[0]
    one, other = (f"The special magic {city} number is: " for city in cities)
    whole = tokenizer.encode(f"{one}{numbers[0]}. {other}{numbers[1]}", specials=False)
    assert whole[-len(case.target) :] == list(case.target)
    assert "".join(tokenizer.decode(case.prompt).split()).endswith("numberis:")
    wrong_word = [i in first or i in second for i in range(len(case.target))]
    results = Results(tmp_path / "a", {}, ("seed",))
    (row,) = evaluate(task, Scripted(lambda case: wrong_word), results, score="logits")
    assert row["correct"] == [True, True]
    wrong_digit = [i != second[-1] for i in range(len(case.target))]
    results = Results(tmp_path / "b", {}, ("seed",))
    (row,) = evaluate(task, Scripted(lambda case: wrong_digit), results, score="logits")
    assert row["correct"] == [True, False]
    assert row["score"] == 0.5


def test_an_interrupted_run_ends_with_the_same_rows(
    file: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    task = task_of(file, tokenizer, rounds=2)
    answers = lambda case: f"{case.reference} of {case.columns['context_tokens']}"  # noqa: E731
    whole = evaluate(task, Scripted(answers), Results(tmp_path / "whole", {"a": 1}, KEYS))
    for rows in (0, 1, 4, 6):
        part = tmp_path / f"part{rows}"
        with pytest.raises(KeyboardInterrupt):
            evaluate(task, Scripted(answers, stop_after=rows), Results(part, {"a": 1}, KEYS))
        if rows:
            with (part / "results.jsonl").open("a", encoding="utf-8") as half:
                half.write('{"context_length": 700, "depth_pe')
        assert evaluate(task, Scripted(answers), Results(part, {"a": 1}, KEYS)) == whole
        assert (part / "results.jsonl").read_bytes() == (
            tmp_path / "whole" / "results.jsonl"
        ).read_bytes()


def test_the_directory_of_another_run_is_refused(file: Path, tmp_path: Path) -> None:
    task = task_of(file, train_tokenizer([prose()], 400))
    evaluate(task, Scripted(lambda case: ""), Results(tmp_path, {"seed": 1, "rounds": 1}, KEYS))
    with pytest.raises(InputError, match="its seed is 1 and not 2"):
        Results(tmp_path, {"seed": 2, "rounds": 1}, KEYS)
    lines = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "results.jsonl").write_text("\n".join([lines[0], lines[1][:30], *lines[2:], ""]))
    with pytest.raises(InputError, match="line 2, is not valid JSON"):
        Results(tmp_path, {"seed": 1, "rounds": 1}, KEYS)
    (tmp_path / "results.jsonl").write_text('{"question": "?"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="has no 'context_length'"):
        Results(tmp_path, {"seed": 1, "rounds": 1}, KEYS)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(InputError, match=r"without settings\.json"):
        Results(tmp_path, {"seed": 1, "rounds": 1}, KEYS)


def test_impossible_tasks_are_refused(file: Path) -> None:
    tokenizer = train_tokenizer([prose()], 400)
    with pytest.raises(
        InputError, match=r"has [\d,]+ tokens and the longest context needs 999,800"
    ):
        task_of(file, tokenizer, lengths=[1000, 1_000_000])
    with pytest.raises(ConfigError, match="length 250 is too short"):
        task_of(file, tokenizer, lengths=[250])
    with pytest.raises(ConfigError, match="2 needles are hidden and 3 asked for"):
        task_of(file, tokenizer, needles=2, retrieved=3)
    with pytest.raises(ConfigError, match="0 needles are hidden and 1 asked for"):
        task_of(file, tokenizer, needles=0)
    with pytest.raises(ConfigError, match="seed is -1"):
        task_of(file, tokenizer, seed=-1)
    with pytest.raises(ConfigError, match="rounds is 0"):
        task_of(file, tokenizer, rounds=0)


def test_ranges() -> None:
    assert parse_lengths("4096,1024,1024") == [1024, 4096]
    assert parse_lengths("1024:8192:4") == [1024, 3413, 5803, 8192]
    assert parse_depths("0:100:5") == [0, 25, 50, 75, 100]
    assert parse_depths("50") == [50]
    assert parse_depths("0:100:5", "sigmoid") == [0, 7.6, 50, 92.4, 100]
    for wrong in ("", "a", "1:2", "1:2:0", "5:1:3", "1:2:1e9", "nan", "1,,2", "1:2:2.5"):
        with pytest.raises(ConfigError, match="write numbers as in"):
            parse_lengths(wrong)
    with pytest.raises(ConfigError, match="has 0"):
        parse_lengths("0,5")
    for wrong in ("-1", "0,100.5", "0:200:3"):
        with pytest.raises(ConfigError, match="from 0 to 100"):
            parse_depths(wrong)


def test_windows_of_text_without_full_stops_and_of_longer_text(file: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer([prose()], 400)
    plain = tmp_path / "plain.txt"
    plain.write_text(prose().replace(".", " ;"), encoding="utf-8")
    window = read_haystack(str(plain), tokenizer, 4000).window(1000, [0, 1])
    assert window.index_at(37.0) == 370
    # The window of a length does not depend on other lengths.
    few = read_haystack(str(file), tokenizer, 4 * 800).window(700, [3, 700])
    many = read_haystack(str(file), tokenizer, 4 * 5000).window(700, [3, 700])
    np.testing.assert_array_equal(few.ids, many.ids)


def test_json_arrays_of_the_original_scripts_are_read(tmp_path: Path) -> None:
    rows = [{"context_length": 1000, "depth_percent": 50, "response": "1", "answer": "1",
             "correct": True, "seed": 0}]  # fmt: skip
    path = tmp_path / "needle.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    assert read_results(path) == ({}, rows)
    path.write_text("[1]", encoding="utf-8")
    with pytest.raises(InputError, match="not a row of results"):
        read_results(path)
    path.write_text('[{"a": 1}', encoding="utf-8")
    with pytest.raises(InputError, match="not valid JSON"):
        read_results(path)


def test_haystacks_are_read_from_files_records_and_books(file: Path, tmp_path: Path) -> None:
    lines = tmp_path / "essays.jsonl"
    lines.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("One.", "Two.")), encoding="utf-8"
    )
    assert list(read_texts(str(lines))) == ["One.", "Two."]
    assert "".join(read_texts("book:Ruth")).startswith("Now it came to pass")
    lines.write_text('{"body": "One."}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"record 1 has no field 'text' .*'body'"):
        list(read_texts(str(lines)))
    lines.write_text('{"text": "One."}\n{"text": \n', encoding="utf-8")
    with pytest.raises(InputError, match="line 2 cannot be read"):
        list(read_texts(str(lines)))
    tokenizer = train_tokenizer([prose()], 400)
    haystack = read_haystack(str(file), tokenizer, 10**9)
    assert tokenizer.decode(haystack.ids.tolist()) == prose()
    assert haystack.ends.sum() == prose().count(".")
