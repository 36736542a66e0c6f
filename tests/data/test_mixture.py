"""Check mixtures of data sets: shares, independence of processes, resuming, broken examples."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import TEXTS, assert_same, loader, take, tokenizer, write_lines

from lwm.core.config import from_dict, to_dict
from lwm.core.errors import ConfigError, InputError
from lwm.data.config import DataConfig, DataSet
from lwm.data.loader import Loader
from lwm.data.rows import broken as broken_module
from lwm.data.rows.draws import SHARES, Shares
from lwm.data.splits import training_texts

WEIGHTS = st.lists(st.floats(0.02, 10), min_size=1, max_size=6)


@given(weights=WEIGHTS, seed=st.integers(0, 5), first=st.integers(0, 3 * SHARES))
def test_each_set_is_read_in_order_by_its_share(
    weights: list[float], seed: int, first: int
) -> None:
    shares = Shares(weights, seed=seed)
    drawn = [shares[place] for place in range(first, first + SHARES)]
    if len(weights) == 1:
        assert drawn == [(0, place) for place in range(first, first + SHARES)]
        return
    for number, weight in enumerate(weights):
        indices = [at for chosen, at in drawn if chosen == number]
        assert indices == list(range(indices[0], indices[0] + len(indices)))  # each once
        if first % SHARES == 0:
            assert abs(len(indices) - weight / sum(weights) * SHARES) < 1


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, DataSet]:
    result = {}
    for name, count, weight in (("ones", 60, 0.5), ("twos", 30, 0.3), ("threes", 7, 0.2)):
        lines = [{"text": f"{name} {i}", "words": f"{name} {i}"} for i in range(count)]
        path = write_lines(tmp_path / f"{name}.jsonl", lines)
        result[name] = DataSet(path=str(path), weight=weight)
    return result


def mixed(sets: dict[str, DataSet], **settings: Any) -> Loader:
    return loader("", mixture=sets, packing="pad", **settings)


def names(batches: Loader, count: int) -> list[str]:
    return [
        tokenizer().decode(row[1:][row[1:] > 1].tolist()).split()[0]
        for batch in take(batches, count)
        for row in batch["tokens"]
    ]


def test_batches_hold_the_sets_by_weight(sets: dict[str, DataSet]) -> None:
    result = Counter(names(mixed(sets), 250))
    assert result == {"ones": 500, "twos": 300, "threes": 200}
    sets["twos"] = DataSet(path="nowhere.jsonl", weight=0)  # omitted, so not opened
    assert set(names(mixed(sets), 10)) == {"ones", "threes"}


@pytest.mark.parametrize("packing", ["pack", "concatenate"])
def test_mixture_does_not_depend_on_processes_and_resumes(
    sets: dict[str, DataSet], packing: str
) -> None:
    settings: dict[str, Any] = {"packing": packing, "mixture": sets}
    whole = loader("", **settings)
    batches, states = [], []
    for _ in range(8):
        states.append(json.dumps(whole.get_state()))
        batches.append(next(whole))
    for rows in ([0, 1], [3]):
        indices = take(loader("", rows=rows, **settings), 8)
        assert_same(indices, [{k: v[rows] for k, v in batch.items()} for batch in batches])
    again = loader("", **settings)
    again.set_state(json.loads(states[5]))
    assert_same(take(again, 3), batches[5:])


def test_position_of_another_mixture_is_refused(sets: dict[str, DataSet]) -> None:
    state = json.loads(json.dumps(mixed(sets).get_state()))
    mixed(sets).set_state(state)
    other = sets | {"ones": DataSet(path=sets["ones"].path, weight=0.9)}
    with pytest.raises(InputError, match=r"with mixture \[500, 300, 200\] and this run has"):
        mixed(other).set_state(state)
    with pytest.raises(InputError, match="with examples"):
        loader(sets["ones"].path, packing="pad").set_state(state)


def test_each_set_may_have_fields(sets: dict[str, DataSet]) -> None:
    sets["twos"] = DataSet(path=sets["twos"].path, fields="[text],words", weight=0.5)
    for batch in take(mixed(sets, fields="text"), 20):
        for row, weights in zip(batch["tokens"], batch["weights"], strict=True):
            text = tokenizer().decode(row[row > 1].tolist())
            assert (text.count("twos") == 2) == (weights[0] == 0)


def test_broken_lines_count_for_their_set_only(
    sets: dict[str, DataSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(broken_module, "say", logged.append)
    lines: list[Any] = [{"text": "fours"}] * 20
    lines[4] = lines[11] = b"{"
    path = write_lines(tmp_path / "fours.jsonl", lines)
    sets["fours"] = DataSet(path=str(path), weight=0.3)
    # Two of 117 examples in all, but two of the twenty of one set.
    with pytest.raises(InputError, match=r"of 20 examples of the data set 'fours'.*fours.jsonl"):
        take(mixed(sets, max_broken=0.05), 100)
    allowed = mixed(sets, max_broken=0.1)
    take(allowed, 100)
    assert {report.line for report in allowed.reports} == {5, 12}
    assert allowed.broken == 2


def test_every_set_has_held_out_examples(sets: dict[str, DataSet]) -> None:
    settings: dict[str, Any] = {"held_out": 0.2, "shuffle": False}
    assert mixed(sets, split="evaluation", **settings).examples == 12 + 6 + 1
    assert mixed(sets, **settings).examples == 48 + 24 + 6
    assert set(names(mixed(sets, split="evaluation", **settings), 30)) == set(sets)


def test_training_texts_take_turns(sets: dict[str, DataSet]) -> None:
    result = list(training_texts(DataConfig(mixture=sets)))
    assert len(result) == 97
    assert [text.split()[0] for text in result[:6]] == ["ones", "twos", "threes"] * 2


def test_mixture_round_trips_through_json(sets: dict[str, DataSet]) -> None:
    config = DataConfig(mixture=sets)
    assert from_dict(DataConfig, json.loads(json.dumps(to_dict(config))), "run.json") == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "a.jsonl"}, "path is 'a.jsonl' and mixture has ones"),
        ({"mixture": {"a": DataSet(weight=0)}}, "weights sum to 0"),
        ({"mixture": {"a": DataSet(path="x"), "b": DataSet(path="y", weight=1e-4)}}, "b.weight"),
    ],
)
def test_refusals(sets: dict[str, DataSet], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**({"mixture": sets} | settings))  # type: ignore[arg-type]


def test_set_without_a_path_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'images'.*--data.mixture.images.path.*weight 0"):
        DataConfig(mixture={"images": DataSet()}).sets()
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="weight is"):
            DataSet(weight=weight)


def test_mixture_of_one_set_equals_the_set(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    alone = take(loader(path, packing="pack"), 5)
    assert_same(take(loader("", mixture={"a": DataSet(path=str(path))}, packing="pack"), 5), alone)
    assert np.unique(alone[0]["segments"]).size > 1
