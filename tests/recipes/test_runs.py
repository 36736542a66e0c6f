"""Check whole runs: resumed exactly, extended, adapted, opened as models, refused."""

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
from lwm.recipes.learn import lock, make_run
from lwm.training.loop import Diverged
from lwm.training.metrics import read_metrics

ENDLESS = (
    "--steps", "100000", "--optimizer.schedule", "constant", "--checkpoint.every", "9999",
)  # fmt: skip

# Without a schedule, runs of any length share one compiled step.
LORA = (
    "--lora.rank", "4", "--optimizer.learning-rate", "1e-2", "--optimizer.schedule", "constant",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    train_model(run(out, data))
    return out


def test_the_loss_falls(whole):
    values = losses(whole)
    assert len(values) == STEPS
    assert values[-1] < values[0] - 0.3
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("crashes_at", [2, 7])
def test_a_crashed_run_resumes_exactly(whole, data, tmp_path, monkeypatch, crashes_at):
    """Check a crash before the first checkpoint, and one between two checkpoints."""
    out = tmp_path / "run"
    real = Loader.__next__
    count = 0

    def failing(self):
        nonlocal count
        count += 1
        if count > crashes_at:
            raise RuntimeError("the power is cut")
        return real(self)

    monkeypatch.setattr(Loader, "__next__", failing)
    with pytest.raises(RuntimeError, match="power"):
        train_model(run(out, data))
    monkeypatch.undo()
    assert train(out, data) == losses(whole)


def test_a_torn_checkpoint_is_skipped(whole, data, tmp_path, capsys):
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


def test_a_run_whose_checkpoints_are_all_torn_is_refused(whole, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for state in (out / "checkpoints").glob("*/state"):
        shutil.rmtree(state)
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        train_model(run(out, data))


def test_a_finished_run_is_not_changed(whole, data, capsys):
    before = losses(whole)
    train_model(run(whole, data))
    assert "already" in capsys.readouterr().err
    assert losses(whole) == before


def test_fresh_renames_the_old_run(whole, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    values = train(out, data, "--fresh", "--steps", "2")
    assert len(values) == 2
    assert values[0] == losses(whole)[0]
    aside = [path for path in tmp_path.iterdir() if path != out]
    assert [len(losses(path)) for path in aside] == [STEPS]


def test_another_model_in_the_same_directory_is_refused(whole, data):
    with pytest.raises(ConfigError, match="hidden_size is 32, not 64"):
        train_model(run(whole, data, "--model.hidden-size", "64"))


def test_a_run_and_each_checkpoint_open_as_models(whole, tmp_path):
    """Check their logits, also after conversion."""
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


def test_evaluations_use_the_held_out_split(data, tmp_path):
    held_out = ("--data.held-out", "0.2", "--evaluate-every", "4", "--evaluation-batches", "2")
    train(tmp_path / "run", data, *held_out)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    values = [row["loss"] for row in rows if row["split"] == "evaluation"]
    assert len(values) == STEPS / 4
    assert values[-1] < values[0]
    best = tmp_path / "run" / "checkpoints"
    assert {path.name for path in best.iterdir()} >= {"8", "12"}


def test_a_run_trains_alike_on_a_mesh_and_resumes_on_another(whole, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for step in ("8", str(STEPS)):
        shutil.rmtree(out / "checkpoints" / step)
    with pytest.raises(CheckpointError):  # no checkpoint is left
        lwm.load(out)
    train_model(run(out, data, "--mesh", "1,2,1,2"))
    np.testing.assert_allclose(losses(out), losses(whole), rtol=1e-4)
    shutil.rmtree(out / "checkpoints" / str(STEPS))
    train_model(run(out, data))
    np.testing.assert_allclose(losses(out), losses(whole), rtol=1e-4)


def test_a_stage_starts_from_the_weights_of_the_last_one(whole, data, tmp_path):
    """Check that only theta and length change."""
    longer = ("--init", str(whole), "--sequence-length", "64", "--model.rope-theta", "1e6")
    values = train(tmp_path / "run", data, *longer, "--steps", "2", "--batch-size", "2")
    assert values[0] < losses(whole)[0] - 0.2
    before, after = lwm.load(whole), lwm.load(tmp_path / "run")
    assert after.config == replace(before.config, max_sequence_length=64, rope_theta=1e6)
    assert after.tokenizer.encode("ark dove") == before.tokenizer.encode("ark dove")


def test_a_checkpoint_of_another_size_is_refused(whole, data, tmp_path):
    with pytest.raises(ConfigError, match="hidden_size 32, but this run has 64"):
        train_model(run(tmp_path / "run", data, "--init", str(whole), "--model.hidden-size", "64"))
    assert not (tmp_path / "run").exists()


def test_adapters_are_trained_saved_loaded_and_merged(whole, data, tmp_path):
    out = tmp_path / "run"
    values = train(out, data, "--init", str(whole), *LORA)
    assert values[0] < losses(whole)[0] - 0.2
    assert values[-1] < values[0]
    tokens = np.arange(20)[None]
    base, adapted = lwm.load(whole).logits(tokens).text, lwm.load(out).logits(tokens).text
    assert np.abs(base - adapted).max() > 1e-3
    adapters, full = (
        sum(f.stat().st_size for f in (r / "checkpoints" / str(STEPS)).rglob("*") if f.is_file())
        for r in (out, whole)
    )
    assert adapters < full


def test_adapters_do_not_need_the_checkpoint_they_started_from(whole, data, tmp_path):
    """Check it with the checkpoint gone, as when its own run deletes it."""
    base, out = tmp_path / "base", tmp_path / "adapters"
    shutil.copytree(whole, base)
    lora = ("--init", str(base), *LORA)
    train(out, data, *lora, "--steps", "4")
    tokens = np.arange(20)[None]
    before = lwm.load(out).logits(tokens).text
    (base / "checkpoints" / str(STEPS)).rename(base / "checkpoints" / str(STEPS + 1))
    np.testing.assert_array_equal(lwm.load(out).logits(tokens).text, before)
    assert len(train(out, data, *lora, "--steps", "6")) == 6


def test_the_inputs_of_a_run_without_checkpoints_are_replaced(whole, data, tmp_path):
    """Check that a run takes another tokenizer only as long as it has no checkpoint."""
    out, other = tmp_path / "run", tmp_path / "other.json"
    out.mkdir()
    shutil.copytree(whole / "tokenizer", out / "tokenizer")
    shutil.copy(whole / "run.json", out)
    tokenizer = json.loads((whole / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"].pop()
    other.write_text(json.dumps(tokenizer), encoding="utf-8")
    named = ("--tokenizer", str(other))
    train(out, data, *named, "--steps", "2")
    assert read_tokenizer(out / "tokenizer").backend.to_str() == (
        read_tokenizer(other).backend.to_str()
    )
    with pytest.raises(ConfigError, match="another tokenizer than"):
        train_model(run(whole, data, *named))


def test_only_one_training_at_a_time_uses_a_directory(whole, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    with lock(out):
        for flags in ((), ("--fresh",)):
            with pytest.raises(ConfigError, match="another process is training in"):
                train_model(run(out, data, *flags))
    train_model(run(out, data))


def test_fresh_works_inside_the_directory(tmp_path, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()
    monkeypatch.chdir(out)
    make_run(Path("."), fresh=True)
    assert len(list(tmp_path.iterdir())) == 2


def test_two_processes_train_alike_and_stop_together(whole, data, tmp_path):
    """Check the losses of two processes of two devices each, and a signal that only one gets."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = tmp_path / "run"
    together = [
        "--mesh", "1,4,1,1", "--distributed.coordinator", f"localhost:{port}",
        "--distributed.processes", "2", *ENDLESS,
    ]  # fmt: skip
    processes = [
        spawn(
            *settings(out, data, *together, "--distributed.process", str(number)),
            JAX_NUM_CPU_DEVICES="2",
        )
        for number in range(2)
    ]
    while len(losses(out)) < 8 and processes[0].poll() is None:
        time.sleep(0.02)
    processes[1].terminate()
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 128 + 15, errors
    values = losses(out)
    assert str(len(values)) in {path.name for path in (out / "checkpoints").iterdir()}
    # Only during the warm-up is the schedule that of the shorter run.
    np.testing.assert_allclose(values[:5], losses(whole)[:5], rtol=1e-4)


def test_a_missing_process_is_reported_in_one_sentence(data, tmp_path):
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
def test_a_killed_run_resumes_exactly(whole, data, tmp_path, workers):
    """Check SIGKILL at a random moment, and that the workers end with the run."""
    random = np.random.default_rng(workers)
    out = tmp_path / "run"
    process = spawn(*settings(out, data, "--data.workers", str(workers)))
    while not (out / "metrics.jsonl").is_file() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(float(random.uniform(0.0, 1.0)))
    process.kill()
    process.communicate(timeout=60)  # a worker that lives on would hold the pipes open
    assert train(out, data) == losses(whole)


def test_a_signal_saves_and_exits_with_one_sentence(whole, data, tmp_path):
    out = tmp_path / "run"
    # The signal reaches the whole group, the worker that reads data too, as Ctrl-C does.
    worker = ("--data.workers", "1", "--data.prefetch", "0")
    process = spawn(*settings(out, data, *ENDLESS, *worker))
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


def test_a_run_that_diverges_stops_with_a_remedy(data, tmp_path, capsys):
    wild = ("--optimizer.learning-rate", "1e30", "--skips", "3")
    with pytest.raises(Diverged, match=r"3 steps in a row.*learning_rate"):
        train_model(run(tmp_path / "run", data, *wild))
    assert "the step changed nothing" in capsys.readouterr().err


def test_a_full_disk_leaves_the_last_good_checkpoint(whole, data, tmp_path):
    """Check with a limit on file sizes from the first checkpoint on."""
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
    ("flags", "error", "words"),
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
def test_wrong_settings_are_refused_before_writing(data, tmp_path, flags, error, words):
    with pytest.raises(error, match=words):
        train_model(run(tmp_path / "run", data, *flags))
    assert not (tmp_path / "run").exists()
