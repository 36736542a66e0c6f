"""Check that batches do not depend on processes, workers or interruptions, and that unusable data
is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from small_data import (
    TEXTS,
    assert_same,
    ids,
    loader,
    records,
    take,
    tokenizer,
    write_lines,
)

from lwm.core.errors import ConfigError, InputError
from lwm.data import loader as loader_module
from lwm.data.config import DataConfig
from lwm.data.examples.examples import Example
from lwm.data.loader import Loader
from lwm.data.rows import broken as broken_module
from lwm.data.rows import draws
from lwm.data.rows.draws import Order
from lwm.data.rows.packing import Packing
from lwm.data.sources.array_record import write_array_record
from lwm.data.splits import training_texts

PACKINGS: list[Packing] = ["concatenate", "pack", "pad"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "a.jsonl", records())


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(broken_module, "say", lines.append)
    return lines


def test_batches(data: Path) -> None:
    for packing in PACKINGS:
        batch = next(loader(data, packing=packing))
        assert set(batch) == {"tokens", "targets", "weights", "positions", "segments"}
        for name, array in batch.items():
            assert array.shape == (4, 32)
            assert array.dtype == (np.float32 if name == "weights" else np.int32)
            assert array.flags.c_contiguous


def test_padded_rows_follow_the_file(data: Path) -> None:
    """Check that each row is one example in the order of the file, unshuffled and padded."""
    batches = take(loader(data, packing="pad", shuffle=False, sequence_length=200), 15)
    rows = [
        (row, target)
        for b in batches
        for row, target in zip(b["tokens"], b["targets"], strict=True)
    ]
    for text, (row, targets) in zip(TEXTS, rows, strict=True):
        expected = [0, *ids(text), 1]
        assert row[: len(expected) - 1].tolist() == expected[:-1]
        assert targets[: len(expected) - 1].tolist() == expected[1:]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_processes_share_the_rows_of_one_batch(
    data: Path, packing: Packing, prefetch: int
) -> None:
    whole = take(loader(data, packing=packing), 6)
    for shares in ([[0, 1], [2, 3]], [[3], [0, 2], [1]]):
        for rows in shares:
            with loader(data, packing=packing, rows=rows, prefetch=prefetch) as shared:
                assert_same(
                    take(shared, 6), [{k: v[rows] for k, v in batch.items()} for batch in whole]
                )


def test_batches_do_not_depend_on_workers(tmp_path: Path, logged: list[str]) -> None:
    """Check this also after resuming with other workers, and that they return reports."""
    broken = {7: b"{", 30: b"[]"}
    lines = [broken.get(i, record) for i, record in enumerate(records())]
    data = write_lines(tmp_path / "a.jsonl", lines)
    settings: dict[str, Any] = {"packing": "pack", "max_broken": 0.1}
    alone = loader(data, **settings)
    batches, states = [], []
    for _ in range(10):
        states.append(json.dumps(alone.get_state()))
        batches.append(next(alone))
    with loader(data, workers=2, prefetch=1, **settings) as shared:
        assert_same(take(shared, 8), batches[:8])
        assert json.dumps(shared.get_state()) == states[8]
        shared.set_state(json.loads(states[6]))
        assert_same(take(shared, 3), batches[6:9])
        assert {report.line for report in shared.reports} == {8, 31}
    with pytest.raises(ValueError, match="closed"):
        next(shared)


def test_worker_reports_its_error(data: Path) -> None:
    with loader(data, workers=1) as batches:
        data.write_bytes(b"changed\n")  # the worker opens the file again
        with pytest.raises(InputError, match="was changed after it was opened"):
            next(batches)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("prefetch", [0, 2])
@hypothesis_settings(max_examples=10)
@given(before=st.integers(0, 12), after=st.integers(1, 4), elsewhere=st.integers(0, 3))
def test_resumes_at_any_batch(
    tmp_path_factory: Any, packing: Packing, prefetch: int, before: int, after: int, elsewhere: int
) -> None:
    path = write_lines(tmp_path_factory.mktemp("resume") / "a.jsonl", records())
    with loader(path, packing=packing, prefetch=prefetch) as first:
        take(first, before)
        state = json.dumps(first.get_state())
        expected = take(first, after)
        with loader(path, packing=packing, prefetch=prefetch) as second:
            take(second, elsewhere)
            second.set_state(json.loads(state))
            assert json.dumps(second.get_state()) == state
            assert_same(take(second, after), expected)
        first.set_state(json.loads(state))
        assert_same(take(first, after), expected)


def test_state_is_small_for_long_books(tmp_path: Path) -> None:
    """Check that a position inside a long example takes a few bytes and resumes exactly."""
    path = write_lines(tmp_path / "a.jsonl", [{"text": " ".join(TEXTS * 10)}] * 2)
    for packing in PACKINGS:
        batches = loader(path, packing=packing, batch_size=2)
        take(batches, 40)
        state = json.dumps(batches.get_state())
        assert len(state) < 400
        resumed = loader(path, packing=packing, batch_size=2)
        resumed.set_state(json.loads(state))
        assert_same(take(resumed, 2), take(batches, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 2}, "with batch_size 4 and this run has 2"),
        ({"sequence_length": 16}, "with sequence_length 32 and this run has 16"),
        ({"seed": 1}, "with seed 0 and this run has 1"),
        ({"packing": "pad"}, "with packing concatenate and this run has pad"),
        ({"fields": "[text]+text"}, "brackets"),
        ({"prepend_text": "a"}, "the data or its fields differ from"),
        ({"fields": "[text]"}, r"with fields \['text'\] and this run has \['\[text\]'\]"),
        ({"loss_weights": "token"}, "with loss_weights example and this run has token"),
    ],
)
def test_state_of_other_data_is_refused(data: Path, change: dict[str, Any], message: str) -> None:
    state = loader(data).get_state()
    with pytest.raises((InputError, ConfigError), match=message):
        loader(data, **change).set_state(state)


def test_state_depends_on_the_loss_of_the_data(tmp_path: Path) -> None:
    path, states = tmp_path / "a.jsonl", []
    for fields in ("[q],a", "q,a"):
        write_lines(path, [{"q": "a", "a": "b", "fields": fields}] * 20)
        states.append(loader(path, fields_from_example="fields").get_state())
    with pytest.raises(InputError, match="the data or its fields differ from"):
        loader(path, fields_from_example="fields").set_state(states[0])


def test_state_of_other_rows_or_version_is_refused(data: Path) -> None:
    state = loader(data, rows=[0, 1]).get_state()
    with pytest.raises(InputError, match="lacks row 2"):
        loader(data).set_state(state)
    with pytest.raises(InputError, match="version 9"):
        loader(data).set_state(state | {"version": 9})


def test_order_differs_by_pass_and_seed(data: Path) -> None:
    orders = [
        [Order(first=10, count=50, shuffle=True, seed=seed)[i] for i in range(turn, turn + 50)]
        for seed in (0, 1)
        for turn in (0, 50)
    ]
    assert all(sorted(order) == list(range(10, 60)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert [Order(first=3, count=4, shuffle=False, seed=0)[i] for i in range(9)] == [
        3, 4, 5, 6, 3, 4, 5, 6, 3
    ]  # fmt: skip


def test_pass_reads_every_example_once(data: Path) -> None:
    batches = loader(data, packing="pad", sequence_length=200, batch_size=6)
    firsts = [batch["tokens"][:, :24] for batch in take(batches, 10)]
    assert len({tuple(row) for row in np.concatenate(firsts).tolist()}) == len(TEXTS)


def test_held_out_examples_are_the_tail(data: Path) -> None:
    settings: dict[str, Any] = {"packing": "pad", "shuffle": False, "held_out": 0.2}
    settings |= {"sequence_length": 200, "batch_size": 1}
    train, evaluation = loader(data, **settings), loader(data, split="evaluation", **settings)
    assert (train.examples, evaluation.examples) == (48, 12)
    training = [tuple(batch["tokens"][0]) for batch in take(train, 48)]
    held_out = [tuple(batch["tokens"][0]) for batch in take(evaluation, 12)]
    assert not set(training) & set(held_out)
    assert held_out[0][: len(ids(TEXTS[48])) + 1] == (0, *ids(TEXTS[48]))
    config = DataConfig(path=str(data), held_out=0.2, shuffle=False)
    assert list(training_texts(config)) == TEXTS[:48]


def test_broken_lines_are_skipped_counted_and_logged(tmp_path: Path, logged: list[str]) -> None:
    lines: list[Any] = list(records())
    lines[3], lines[40], lines[50] = b"{", {"text": 5}, b"   "
    path = write_lines(tmp_path / "a.jsonl", lines)
    batches = loader(path, max_broken=0.05, packing="pad", sequence_length=200)
    take(batches, 60)  # four passes
    assert batches.broken == 2
    name = "Expecting property name enclosed in double quotes"
    assert sorted((report.line, report.reason) for report in batches.reports) == [
        (4, f"it is not JSON ({name} at character 2)"),
        (41, "the key 'text' holds a number, where text is needed"),
    ]
    assert len(logged) == 2
    assert all(f"{path}, line " in line for line in logged)


def test_ten_broken_lines_are_logged(tmp_path: Path, logged: list[str]) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*records(), *[b"{"] * 30])
    batches = loader(path, max_broken=0.5)
    take(batches, 200)
    assert batches.broken == 30
    assert len(logged) == 11
    assert "counted but not logged" in logged[-1]


def test_too_many_broken_lines_stop_the_run(tmp_path: Path, logged: list[str]) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*records(), *[b"{"] * 3])
    with pytest.raises(InputError, match=r"2 of 63 examples are broken, more than max_broken"):
        take(loader(path, max_broken=0.02), 100)
    take(loader(path, max_broken=0.05), 100)


def test_held_out_broken_lines_are_compared_with_the_whole_set(
    tmp_path: Path, logged: list[str]
) -> None:
    settings: dict[str, Any] = {"held_out": 0.1, "split": "evaluation", "max_broken": 0.02}
    path = write_lines(tmp_path / "a.jsonl", [*records()[:58], b"{", records()[58]])
    evaluation = loader(path, **settings)
    take(evaluation, 20)
    assert (evaluation.examples, evaluation.broken) == (6, 1)
    path = write_lines(tmp_path / "b.jsonl", [*records()[:57], b"{", b"{", records()[58]])
    with pytest.raises(InputError, match="2 of 60 examples are broken"):
        take(loader(path, **settings), 20)


def test_broken_lines_of_many_passes_count_once(tmp_path: Path, logged: list[str]) -> None:
    """Check that one process of several may read the broken lines of all."""
    path = write_lines(tmp_path / "a.jsonl", [*records() * 4, *[b"{"] * 3])
    batches = loader(path, max_broken=0.06, rows=[0], packing="pad")
    take(batches, 2000)
    assert batches.broken == 3


def test_data_broken_after_its_beginning_is_refused(
    tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draws, "_FRUITLESS_DRAWS", 5)
    path = write_lines(tmp_path / "a.jsonl", [records()[0], *[b"{"] * 11])
    batches = loader(path, rows=[1], packing="pad", shuffle=False, max_broken=0.3)
    with pytest.raises(InputError, match=r"the last 5 examples read were all blank or broken"):
        next(batches)


@pytest.mark.parametrize("unusable", [[{"text": "a"}, b"{"], [b"", b""], [b"{", b"{"]])
def test_stream_skips_unusable_examples(
    tmp_path: Path, logged: list[str], unusable: list[Any]
) -> None:
    """Check that no stream reads the same broken example in every pass."""
    path = write_lines(tmp_path / "a.jsonl", [*records()[:2], *unusable])
    settings: dict[str, Any] = {"shuffle": False, "packing": "pad", "max_broken": 0.5}
    for size in (4, 2, 16):
        for batch in take(loader(path, batch_size=size, **settings), 3):
            assert (batch["weights"] > 0).any(axis=1).all()


@given(count=st.integers(1, 30), streams=st.integers(1, 40))
def test_unshuffled_streams_read_all_examples(count: int, streams: int) -> None:
    order = Order(first=0, count=count, shuffle=False, seed=0, streams=streams)
    assert [order[place] for place in range(count)] == list(range(count))
    for turn in range(5):
        passed = [order[place] for place in range(turn * count, (turn + 1) * count)]
        assert sorted(passed) == list(range(count))
    for stream in range(streams):
        assert len({order[stream + streams * draw] for draw in range(count)}) == count


@pytest.mark.parametrize(
    ("lines", "settings", "error", "message"),
    [
        ([{"body": "a"}], {}, InputError, r"line 1: it has no key 'text' \(its keys: body\)"),
        ([b"", {"body": "a"}], {}, InputError, "line 2: it has no key"),
        ([b"{", b"5"], {}, InputError, "none of the first 2 examples can be used"),
        ([b"", b" "], {}, InputError, "only blank lines"),
        ([{"vision": [0] * 256}], {"fields": "vision"}, ConfigError, "the model is a text model"),
        ([{"text": "a"}], {"fields": "[text]", "add_eos": False}, InputError, "carries loss"),
        ([{"text": "a"}] * 10, {"held_out": 0.01, "split": "evaluation"}, InputError,
         "held_out is 0.01 of 10 examples, which reserves none"),
        ([{"text": "a"}], {"held_out": 0.9}, InputError, "leaves none to train on"),
        ([{"text": "a"}], {"vocab_size": 50}, InputError, "outside the model's vocabulary of 50"),
        ([{"text": "a"}], {"rows": [4]}, ConfigError, "within the batch"),
        ([{"text": "a"}], {"rows": []}, ConfigError, "within the batch"),
        ([{"text": "a"}], {"held_out": 1.5}, ConfigError, "held_out is 1.5"),
        ([{"text": "a"}], {"workers": -1}, ConfigError, "workers is -1"),
        ([{"text": "a"}], {"fields_index": -2}, ConfigError, "fields_index is -2"),
        ([{"text": "a"}], {"messages": "m", "fields_from_example": "f"}, ConfigError, "one of"),
    ],
)  # fmt: skip
def test_refusals(
    tmp_path: Path,
    lines: list[Any],
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    path = write_lines(tmp_path / "a.jsonl", lines)
    with pytest.raises(error, match=message):
        loader(path, **settings)


def test_chats_have_loss_on_the_assistant(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ruth."}]
    path = write_lines(tmp_path / "a.jsonl", [{"chat": chat}] * 5)
    batch = next(loader(path, messages="chat", packing="pack", sequence_length=128))
    trained = batch["targets"][0][batch["weights"][0] > 0].tolist()
    assert tokenizer().decode(trained).split() == ["Ruth."] * batch["segments"][0].max().item() + [
        "Ruth."
    ]
    assert (
        list(training_texts(DataConfig(path=str(path), messages="chat"))) == ["Who?", "Ruth."] * 5
    )


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (
            b'{"q": "a", "a": "b"}',
            {},
            r"line 1: it has no key 'text' \(its keys: a, q\); .*fields",
        ),
        (b'{"text": "a"}', {"messages": "chat"}, r"no key 'chat' \(its keys: text\).*messages$"),
        (
            b'[{"text": "a"},\n{"text": "b"},\n{"text": "c"}]',
            {},
            "line 1: it begins a JSON array, where an object on each",
        ),
        (b'[{"text": "a"}]', {}, "it begins a JSON array"),
        (b"", {}, "is empty"),
    ],
)
def test_training_texts_refuse_what_the_loader_refuses(
    tmp_path: Path, content: bytes, settings: dict[str, Any], message: str
) -> None:
    """Check that the refusal comes before the first text."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        training_texts(DataConfig(path=str(path), **settings))


def test_tokenized_examples_stay_unchanged(tmp_path: Path, logged: list[str]) -> None:
    path = tmp_path / "a.array_record"
    good = [Example.of_text([i, i + 1, i + 2], [0.0, 0.0, 1.0]) for i in range(200)]
    write_array_record(path, [*good, Example.of_text([5, 300], [0.0, 1.0])])
    batches = loader(path, packing="pad", shuffle=False, vocab_size=300)
    assert next(batches)["tokens"][:, :2].tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]
    take(batches, 60)
    assert (
        batches.reports[0].reason == "it has the token 300, outside the model's vocabulary of 300"
    )
    with pytest.raises(InputError, match=r"fields are 'q,a' and .* holds tokens"):
        loader(path, fields="q,a")
    with pytest.raises(InputError, match="holds tokens, not texts"):
        list(training_texts(DataConfig(path=str(path))))


def test_config_imports_nothing_heavy() -> None:
    heavy = ["jax", "grain", "pyarrow", "fsspec"]
    code = f"import sys, lwm.data.config; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_loader_saves_with_grain_checkpoints(data: Path, tmp_path: Path) -> None:
    import grain

    assert isinstance(loader(data).iterator, grain.DatasetIterator)
    handler: Any = grain.checkpoint.CheckpointHandler()
    first = loader(data, packing="pack", prefetch=1)
    take(first, 3)
    handler.save(tmp_path, first.iterator)
    second = loader(data, packing="pack", prefetch=1)
    handler.restore(tmp_path, second.iterator)
    assert_same(take(second, 3), take(first, 3))
    first.close()
    second.close()


def test_workers_divide_the_rows() -> None:
    result = [loader_module._divisor(rows, workers) for rows, workers in
             [(4, 0), (4, 1), (4, 3), (4, 9), (6, 4), (7, 6), (1, 8)]]  # fmt: skip
    assert result == [0, 1, 2, 4, 3, 1, 1]


def test_loader_takes_its_settings_by_name(data: Path) -> None:
    made = Loader(
        DataConfig(path=str(data)), tokenizer(), sequence_length=8, batch_size=2, vocab_size=300
    )
    assert next(iter(made))["tokens"].shape == (2, 8)
    made.close()
