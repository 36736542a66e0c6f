"""Puts a run together and starts it: the one place that sees a whole `TrainingRun`.

Order: join the other processes, check all settings, open model, tokenizer and data, compile,
resume, learn. Nothing is written before everything that can be refused has been checked.
"""

import shutil
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lwm.attention.strategies import require_heads
from lwm.checkpoints.add_vision import require_codebook
from lwm.checkpoints.checkpoint import VQGAN_DIRECTORY, Checkpoint
from lwm.checkpoints.formats.run import BASE, TOKENIZER, complete_checkpoints
from lwm.checkpoints.formats.vqgan import read_vqgan, write_vqgan
from lwm.checkpoints.open import open_checkpoint
from lwm.checkpoints.write import write_checkpoint
from lwm.core import params
from lwm.core.config import to_dict
from lwm.core.distributed import first_process, join, together
from lwm.core.errors import ConfigError
from lwm.core.files import new_directory
from lwm.core.hardware import peak_flops
from lwm.core.mesh import SEQUENCE, TENSOR, make_mesh, require_all_devices
from lwm.core.progress import say
from lwm.core.sharding import TRAINING
from lwm.data.loader import Loader
from lwm.data.text.tokenizer import Tokenizer, checkpoint_tokenizer, read_tokenizer
from lwm.data.text.tokenizer_train import train_tokenizer
from lwm.data.texts import training_texts
from lwm.models.costs import training_flops
from lwm.models.llama import LlamaConfig, require_mesh
from lwm.models.vqgan import VQGAN, VQGANConfig
from lwm.recipes.directory import make_run, require_run, require_same, write_settings
from lwm.recipes.learn import learn
from lwm.recipes.settings import TrainingRun
from lwm.training.batches import Layout
from lwm.training.loop import Work
from lwm.training.metrics import require_tracking
from lwm.training.optimizer import learning_rate
from lwm.training.plan import Plan
from lwm.training.readings import TextReading

TOKENIZER_TEXTS = 20_000
"""Examples of the data that a tokenizer is trained on, at most."""


def train_model(run: TrainingRun) -> Path:
    """Trains, from the beginning or from where the run's directory left off.

    Returns:
        The run's directory, which can be used as a MODEL.

    Raises:
        ConfigError: settings contradict each other, the machine or the checkpoint to start from.
        InputError: the data cannot be used.
        CheckpointError: a checkpoint cannot be read or written.
        CapacityError: weights and optimizer do not fit into memory.
    """
    join(run.distributed)
    with ExitStack() as opened:
        return _start(run, opened)


def _start(run: TrainingRun, opened: ExitStack) -> Path:
    """Does what `train_model` says; what it opens is closed by `opened`, however it ends."""
    mesh = make_mesh(run.mesh)
    layout = Layout(mesh, run.batch_size, run.accumulate, run.sequence_length)
    begun, begin = _begun(run), open_starting_point(run)
    source, config, tokenizer = begin.source, begin.config, begin.tokenizer
    keeps_base = source is not None and source.format == "run" and run.lora.rank > 0
    require_mesh(config, mesh, TRAINING)
    if run.compute.attention.strategy == "ulysses":
        require_heads(config.num_heads // mesh.shape[TENSOR], mesh.shape[SEQUENCE])
    vqgan = _open_vqgan(run, config, source)
    require_run(run.out)
    if run.init and run.out.resolve() in (
        Path(run.init).resolve(),
        *Path(run.init).resolve().parents,
    ):
        raise ConfigError(
            f"--init {run.init} lies in {run.out}, where this run is to be written; choose "
            "another --out"
        )
    require_tracking(run.tracking)
    require_all_devices(mesh)
    loader = partial(
        Loader, sequence_length=run.sequence_length, rows=layout.rows,
        batch_size=run.batch_size, vocab_size=config.vocab_size, vision=config.vision,
    )  # fmt: skip
    batches = opened.enter_context(closing(loader(run.data, tokenizer)))
    held_out = None
    if run.loop.evaluate_every:
        if not run.data.held_out:
            raise ConfigError(
                f"evaluate_every is {run.loop.evaluate_every} but nothing is held out; give "
                "--data.held-out a share such as 0.01, or --evaluate-every 0"
            )
        plain = replace(run.data, shuffle=False, workers=0, drop_prompt=0.0)
        held_out = HeldOut(loader(plain, tokenizer, split="evaluation"))
        opened.enter_context(closing(held_out))
    plan = Plan(
        config=config, mesh=mesh, optimizer=run.optimizer, compute=run.compute, lora=run.lora,
        steps=run.loop.steps,
    )  # fmt: skip
    plan.require_memory()
    facts = {
        "model": to_dict(config),
        "lora": to_dict(run.lora) if run.lora.rank else None,
        "init": str((run.out / BASE).resolve())
        if keeps_base
        else source.absolute_source
        if source
        else "",
    }
    rate = learning_rate(run.optimizer, run.loop.steps)
    work = Work(
        step=plan.step(),
        evaluate=plan.evaluate(),
        place=layout.place,
        batches=batches,
        held_out=held_out,
        learning_rates=np.asarray(jax.vmap(rate)(np.arange(run.loop.steps))),
        reading=TextReading(
            step_flops=training_flops(config, run.batch_size, run.sequence_length),
            peak_flops=peak_flops(mesh.size),
        ),
    )
    return learn(
        run,
        work,
        opened,
        template=plan.template(),
        first_state=lambda: plan.first_state(source, seed=run.seed),
        frozen=lambda: plan.frozen(source),
        facts=facts,
        same=partial(_require_same, facts, run.out),
        write_settings=lambda: _write_settings(
            run, config, tokenizer, vqgan, source if keeps_base else None, begun=begun
        ),
        about=f"training {params.count(plan.specs):,} of {params.count(plan.model_specs):,} "
        f"parameters on {mesh.size} {jax.devices()[0].platform} device{'s' * (mesh.size > 1)}, "
        f"{run.batch_size} x {run.sequence_length:,} tokens a step",
    )


class HeldOut:
    """The evaluation split, read from its start each time."""

    def __init__(self, loader: Loader) -> None:
        self._loader, self._start = loader, loader.get_state()

    def __call__(self) -> Loader:
        self._loader.set_state(self._start)
        return self._loader

    def close(self) -> None:
        self._loader.close()


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """What a run starts from.

    Args:
        source: the checkpoint whose weights it takes; None for random ones.
    """

    source: Checkpoint | None
    config: LlamaConfig
    tokenizer: Tokenizer


def open_starting_point(run: TrainingRun) -> StartingPoint:
    """Opens what a run starts from, without loading weights.

    Raises:
        ConfigError, CheckpointError: it is missing, broken, or of another size.
        InputError: there is no data to train a tokenizer on.
    """
    source = _open_source(run)
    config = run.model.resolve(run.sequence_length, source.config if source else None, run.init)
    if run.lora.rank and source is None:
        raise ConfigError(
            f"lora.rank is {run.lora.rank} but no --init is given; adapters need a model to adapt"
        )
    return StartingPoint(
        source=source, config=config, tokenizer=_open_tokenizer(run, config, source)
    )


def _begun(run: TrainingRun) -> bool:
    """Whether the run goes on from a checkpoint, so that what lies beside it must stay."""
    return not run.fresh and bool(complete_checkpoints(run.out))


def _open_source(run: TrainingRun) -> Checkpoint | None:
    """The model to start from; of adapters that go on, the one they have been added to so far."""
    if not run.init:
        return None
    if run.lora.rank and (run.out / BASE).is_dir() and _begun(run):
        say(f"the adapters in {run.out} go on with the model they began on, in {run.out / BASE}")
        return open_checkpoint(str(run.out / BASE))
    return open_checkpoint(run.init)


def _open_tokenizer(run: TrainingRun, config: LlamaConfig, source: Checkpoint | None) -> Tokenizer:
    """The run's tokenizer: its own if it is being resumed, the one named, that of the model to
    start from, or one trained on the data."""
    kept = run.out / TOKENIZER
    resumed = read_tokenizer(kept) if kept.is_dir() and _begun(run) else None
    if run.tokenizer:
        named = read_tokenizer(Path(run.tokenizer))
        if resumed is not None and named.backend.to_str() != resumed.backend.to_str():
            raise ConfigError(
                f"{run.out} was begun with another tokenizer than {run.tokenizer}; start anew "
                "with --fresh, or in another --out"
            )
        return named
    if resumed is not None:
        return resumed
    if source is not None:
        found = checkpoint_tokenizer(source.vocabulary)
        if found is None:
            raise ConfigError(
                f"--init {run.init} has no tokenizer; add --tokenizer with a tokenizer.json, a "
                "tokenizer.model or a directory that holds one"
            )
        return found
    learnt = islice(training_texts(run.data, config.vision), TOKENIZER_TEXTS)
    say(f"training a tokenizer of {config.vocab_size:,} tokens on the data")
    return train_tokenizer(learnt, config.vocab_size)


def _require_same(wanted: dict[str, Any], directory: Path, found: dict[str, Any]) -> None:
    """Refuses to go on with another model than the one that the directory holds."""
    base = {"init": wanted["init"]} if wanted["lora"] else {}
    for has, asked in (
        (found.get("model") or {}, wanted["model"]),
        (found.get("lora") or {}, wanted["lora"] or {}),
        ({"init": found.get("init")} if found.get("lora") else {}, base),
    ):
        require_same(directory, has, asked)


def _open_vqgan(
    run: TrainingRun, config: LlamaConfig, source: Checkpoint | None
) -> tuple[VQGANConfig, VQGAN] | None:
    """The VQGAN that goes with the run, if one is named or comes with the model to start from."""
    kept = run.out / VQGAN_DIRECTORY
    resumed = read_vqgan(kept) if kept.is_dir() and _begun(run) else None
    named = Path(run.vqgan) if run.vqgan else source.vqgan if source else None
    if named is None:
        return resumed
    found = read_vqgan(named)
    require_codebook(found[0], str(named), config, "the model to train")
    if resumed is not None and not _same(found, resumed):
        raise ConfigError(
            f"{run.out} was begun with another VQGAN than {named}; start anew with --fresh, or in "
            "another --out"
        )
    return found


def _same(one: tuple[VQGANConfig, VQGAN], other: tuple[VQGANConfig, VQGAN]) -> bool:
    return one[0] == other[0] and all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True)
    )


def _write_settings(
    run: TrainingRun,
    config: LlamaConfig,
    tokenizer: Tokenizer,
    vqgan: tuple[VQGANConfig, VQGAN] | None,
    base: Checkpoint | None,
    *,
    begun: bool,
) -> None:
    """The run's directory with its settings, its tokenizer, and the model that adapters are added
    to; moves aside what `fresh` refuses."""
    with together():  # nobody looks before the directory is there
        if first_process():
            make_run(run.out, fresh=run.fresh)
            if not begun:  # what a run that ended before its first checkpoint left is of no use
                for name in (TOKENIZER, VQGAN_DIRECTORY, BASE):
                    shutil.rmtree(run.out / name, ignore_errors=True)
            if not (run.out / TOKENIZER).is_dir():
                with new_directory(run.out / TOKENIZER) as directory:
                    tokenizer.save(directory)
            if vqgan is not None and not (run.out / VQGAN_DIRECTORY).is_dir():
                write_vqgan(run.out / VQGAN_DIRECTORY, *vqgan)
            if base is not None and not (run.out / BASE).is_dir():
                write_checkpoint(
                    base, run.out / BASE, form="lwm", dtype="float32",
                    save_tokenizer=tokenizer.save,
                )  # fmt: skip
            settings = {"run": to_dict(run), "model": to_dict(config)}
            write_settings(run.out, settings)
