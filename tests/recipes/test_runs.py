"""Whole runs: resumed exactly, extended, adapted, opened as models, refused with a sentence."""

import json
import os
import resource
import shutil
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_run import STEPS, losses, run, settings, spawn, train, write_text

import lwm
from lwm.core.errors import CheckpointError, ConfigError, InputError
from lwm.data.loader import Loader
from lwm.data.text.tokenizer import read_tokenizer
from lwm.recipes.assemble import train_model
from lwm.recipes.directory import lock, make_run
from lwm.training.loop import Diverged


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train_model(run(out, data))
    return out


def test_it_learns(whole):
    found = losses(whole)
    assert len(found) == STEPS
    assert found[-1] < found[0] - 0.3
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("breaks_at", [7])
def test_a_run_that_broke_goes_on_exactly(whole, data, tmp_path, monkeypatch, breaks_at):
    """Broken between two checkpoints: before the first, and after it."""
    out = tmp_path / "run"
    count = 0
    real = Loader.__next__

    def failing(self):
        nonlocal count
        count += 1
        if count > breaks_at:
            raise RuntimeError("the power is cut")
        return real(self)

    monkeypatch.setattr(Loader, "__next__", failing)
    with pytest.raises(RuntimeError, match="power"):
        train_model(run(out, data))
    monkeypatch.undo()
    assert train(out, data) == losses(whole)


def test_a_torn_checkpoint_is_passed_over(whole, data, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    last = out / "checkpoints" / str(STEPS)
    for file in sorted(last.rglob("*")):
        if file.is_file() and file.stat().st_size > 2000:
            file.write_bytes(file.read_bytes()[:100])
    train_model(run(out, data))
    assert "cannot be read" in capsys.readouterr().err
    assert losses(out) == losses(whole)
    assert (out / "checkpoints" / f"torn-{STEPS}").is_dir()
    assert last.is_dir()


def test_when_all_checkpoints_are_torn_it_says_so(whole, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for state in (out / "checkpoints").glob("*/state"):
        shutil.rmtree(state)
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        train_model(run(out, data))


def test_a_finished_run_stays_as_it_is(whole, data, capsys):
    before = losses(whole)
    train_model(run(whole, data))
    assert "already" in capsys.readouterr().err
    assert losses(whole) == before


def test_fresh_moves_the_old_run_aside(whole, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    assert train(out, data, "--fresh", "--steps", "2") == losses(whole)[:0] + losses(out)
    assert len(losses(out)) == 2
    aside = [path for path in tmp_path.iterdir() if path != out]
    assert [len(losses(path)) for path in aside] == [STEPS]


def test_another_model_in_the_same_directory_is_refused(whole, data):
    with pytest.raises(ConfigError, match="hidden_size is 32, not 64"):
        train_model(run(whole, data, "--model.hidden-size", "64"))


def test_a_run_and_each_checkpoint_open_as_models(whole, tmp_path):
    """Also after conversion, to the same logits."""
    from lwm.checkpoints.open import open_checkpoint
    from lwm.checkpoints.write import write_checkpoint

    tokens = np.arange(20)[None]
    model = lwm.load(whole)
    assert model.config.max_sequence_length == 32
    logits = model.logits(tokens).text
    step = lwm.load(whole / "checkpoints" / str(STEPS))
    np.testing.assert_array_equal(step.logits(tokens).text, logits)
    earlier = lwm.load(whole / "checkpoints" / "8").logits(tokens).text
    assert np.abs(earlier - logits).max() > 1e-3
    assert isinstance(model.generate("ark", max_tokens=5), str)
    write_checkpoint(
        open_checkpoint(str(whole)), tmp_path / "converted", form="lwm", dtype="float32",
        save_tokenizer=model.tokenizer.save,
    )  # fmt: skip
    np.testing.assert_array_equal(lwm.load(tmp_path / "converted").logits(tokens).text, logits)


def test_evaluation_measures_the_held_out_split_alike_each_time(data, tmp_path):
    from lwm.training.metrics import read_metrics

    held = ("--data.held-out", "0.2", "--evaluate-every", "4", "--evaluation-batches", "2")
    train(tmp_path / "run", data, *held)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    found = [row["loss"] for row in rows if row["split"] == "evaluation"]
    assert len(found) == STEPS / 4
    assert found[-1] < found[0]
    best = tmp_path / "run" / "checkpoints"
    assert {path.name for path in best.iterdir()} >= {"8", "12"}


def test_a_run_learns_alike_on_a_mesh_and_goes_on_on_another(whole, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for step in ("8", str(STEPS)):
        shutil.rmtree(out / "checkpoints" / step)
    with pytest.raises(CheckpointError):  # nothing is left to go on from
        lwm.load(out)
    train_model(run(out, data, "--mesh", "1,2,1,2"))
    np.testing.assert_allclose(losses(out), losses(whole), rtol=1e-4)
    shutil.rmtree(out / "checkpoints" / str(STEPS))
    train_model(run(out, data))
    np.testing.assert_allclose(losses(out), losses(whole), rtol=1e-4)


def test_a_stage_starts_from_the_last_ones_weights(whole, data, tmp_path):
    """Theta and length change, nothing else."""
    longer = ("--init", str(whole), "--sequence-length", "64", "--model.rope-theta", "1e6")
    found = train(tmp_path / "run", data, *longer, "--steps", "2", "--batch-size", "2")
    assert found[0] < losses(whole)[0] - 0.2
    before, after = lwm.load(whole), lwm.load(tmp_path / "run")
    assert after.config == replace(before.config, max_sequence_length=64, rope_theta=1e6)
    assert after.tokenizer.encode("ark dove") == before.tokenizer.encode("ark dove")


def test_a_checkpoint_of_another_size_is_refused(whole, data, tmp_path):
    with pytest.raises(ConfigError, match="hidden_size 32, but this run asks for 64"):
        train_model(run(tmp_path / "run", data, "--init", str(whole), "--model.hidden-size", "64"))
    assert not (tmp_path / "run").exists()


def test_adapters_are_trained_saved_loaded_and_merged(whole, data, tmp_path):
    out = tmp_path / "run"
    lora = ("--init", str(whole), "--lora.rank", "4", "--optimizer.learning-rate", "1e-2")
    found = train(out, data, *lora)
    assert found[0] < losses(whole)[0] - 0.2
    assert found[-1] < found[0]
    tokens = np.arange(20)[None]
    base, adapted = lwm.load(whole).logits(tokens).text, lwm.load(out).logits(tokens).text
    assert np.abs(base - adapted).max() > 1e-3
    kept = sum(
        f.stat().st_size for f in (out / "checkpoints" / str(STEPS)).rglob("*") if f.is_file()
    )
    full = sum(
        f.stat().st_size for f in (whole / "checkpoints" / str(STEPS)).rglob("*") if f.is_file()
    )
    assert kept < full


def test_adapters_outlive_the_checkpoint_they_began_on(whole, data, tmp_path):
    """The run they were added to goes on and deletes it."""
    base, out = tmp_path / "base", tmp_path / "adapters"
    shutil.copytree(whole, base)
    lora = ("--init", str(base), "--lora.rank", "2")
    train(out, data, *lora, "--steps", "4")
    tokens = np.arange(20)[None]
    before = lwm.load(out).logits(tokens).text
    (base / "checkpoints" / str(STEPS)).rename(base / "checkpoints" / str(STEPS + 1))
    np.testing.assert_array_equal(lwm.load(out).logits(tokens).text, before)
    assert len(train(out, data, *lora, "--steps", "6")) == 6


def test_what_a_run_left_before_its_first_checkpoint_is_replaced(whole, data, tmp_path):
    """Its tokenizer belongs to no weights; that of a run that goes on does, and no other."""
    out, other = tmp_path / "run", tmp_path / "other.json"
    out.mkdir()
    shutil.copytree(whole / "tokenizer", out / "tokenizer")
    shutil.copy(whole / "run.json", out)
    told = json.loads((whole / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    told["model"]["merges"].pop()
    other.write_text(json.dumps(told), encoding="utf-8")
    named = ("--tokenizer", str(other))
    train(out, data, *named, "--steps", "2")
    assert read_tokenizer(out / "tokenizer").backend.to_str() == (
        read_tokenizer(other).backend.to_str()
    )
    with pytest.raises(ConfigError, match="another tokenizer than"):
        train_model(run(whole, data, *named))


def test_a_directory_takes_one_training_at_a_time(whole, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    with lock(out):
        for more in ((), ("--fresh",)):
            with pytest.raises(ConfigError, match="another process is training in"):
                train_model(run(out, data, *more))
    train_model(run(out, data))


def test_fresh_works_from_within_the_directory(tmp_path, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()
    monkeypatch.chdir(out)
    make_run(Path("."), fresh=True)
    assert len(list(tmp_path.iterdir())) == 2


def test_two_processes_learn_alike(whole, data, tmp_path):
    """Two processes of two devices each, every one reading its own rows."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = tmp_path / "run"
    together = [
        "--mesh", "1,4,1,1", "--distributed.coordinator", f"localhost:{port}",
        "--distributed.processes", "2",
    ]  # fmt: skip
    processes = [
        spawn(
            *settings(out, data, *together, "--distributed.process", str(number)),
            JAX_NUM_CPU_DEVICES="2",
        )
        for number in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    np.testing.assert_allclose(losses(out), losses(whole), rtol=1e-4)


def test_a_process_that_never_comes_is_told_in_a_sentence(data, tmp_path):
    process = spawn(
        *settings(tmp_path / "run", data, "--distributed.coordinator", "localhost:1"),
        "--distributed.processes", "2", "--distributed.process", "1",
        "--distributed.timeout", "2",
    )  # fmt: skip
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert "did not connect to" in errors.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_killed_at_any_moment_it_goes_on_exactly(whole, data, tmp_path, workers):
    """SIGKILL after a random share of the run, saving included; its workers end with it."""
    random = np.random.default_rng(workers)
    out = tmp_path / "run"
    process = spawn(*settings(out, data, "--data.workers", str(workers)))
    while not (out / "metrics.jsonl").is_file() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(float(random.uniform(0.0, 1.0)))
    process.kill()
    process.communicate(timeout=60)  # a worker that lives on would hold the pipes open
    assert train(out, data) == losses(whole)


def test_a_signal_saves_and_leaves_with_a_sentence(whole, data, tmp_path):
    out = tmp_path / "run"
    # The signal reaches the whole group, the worker that reads data too, as Ctrl-C does.
    worker = ("--data.workers", "1", "--data.prefetch", "0")
    endless = (
        "--steps",
        "100000",
        "--optimizer.schedule",
        "constant",
        "--checkpoint.every",
        "9999",
    )
    process = spawn(*settings(out, data, *endless, *worker))
    while len(losses(out)) < 3 and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + 2, errors
    assert "which is saved" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    steps = len(losses(out))
    saved = {path.name for path in (out / "checkpoints").iterdir()}
    assert str(steps) in saved


def test_a_run_that_diverges_stops_and_says_what_to_do(data, tmp_path, capsys):
    wild = ("--optimizer.learning-rate", "1e30", "--skips", "3")
    with pytest.raises(Diverged, match=r"3 steps in a row.*learning_rate"):
        train_model(run(tmp_path / "run", data, *wild))
    assert "the step changed nothing" in capsys.readouterr().err


def test_a_full_disk_leaves_the_last_good_checkpoint(whole, data, tmp_path):
    """From the first checkpoint on files may not grow large: the next cannot be written."""
    out = tmp_path / "run"
    large = ("--model.hidden-size", "256", "--steps", "100000", "--checkpoint.keep", "1")
    process = spawn(*settings(out, data, *large))
    while not (out / "checkpoints" / "4" / "commit_success.txt").is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert "could not be written" in errors.splitlines()[-1]
    assert f"the last good one is {out / 'checkpoints'}" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert lwm.load(out).config.hidden_size == 256


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        (("--data.path", "nowhere.jsonl"), InputError, "nowhere.jsonl"),
        (("--data.fields", "body"), InputError, "text"),
        (("--mesh", "1,1,3,1"), ConfigError, "3"),
        (("--mesh", "1,1,1,4", "--sequence-length", "30"), ConfigError, "30"),
        (("--mesh", "1,4,1,1", "--batch-size", "6"), ConfigError, "6"),
        (("--evaluate-every", "5"), ConfigError, "held-out"),
        (("--lora.rank", "4"), ConfigError, "--init"),
        (("--init", "nothing-here"), CheckpointError, "nothing-here"),
        (("--tokenizer", "nothing.json"), CheckpointError, "nothing.json"),
        (("--model.size", "9b"), ConfigError, "9b"),
        (
            (
                "--mesh",
                "1,1,1,4",
                "--compute.attention.strategy",
                "ulysses",
                "--model.num-heads",
                "2",
            ),
            ConfigError,
            "2 heads",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(data, tmp_path, more, error, words):
    with pytest.raises(error, match=words):
        train_model(run(tmp_path / "run", data, *more))
    assert not (tmp_path / "run").exists()
