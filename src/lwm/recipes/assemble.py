"""Put together a run that trains a language model, and start it.

Order: join the other processes, check all settings, open model, tokenizer and data, compile,
resume, train. Everything that can be refused is checked before anything is written.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

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
from lwm.core.distributed import join
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
from lwm.models.llama import LlamaConfig, require_mesh
from lwm.models.vqgan import VQGAN, VQGANConfig
from lwm.recipes.directory import require_run
from lwm.recipes.learn import learn
from lwm.recipes.settings import TrainingRun
from lwm.training.batches import BatchLayout
from lwm.training.loop import BatchSource, HeldOut
from lwm.training.metrics import require_tracking
from lwm.training.text import TextTraining

TOKENIZER_TEXTS = 20_000
"""Largest number of examples that a tokenizer is trained on."""


def train_model(run: TrainingRun) -> Path:
    """Train from the beginning or from the last checkpoint; return the run's directory, a MODEL.

    Raises LwmError, before anything is written, if settings, data or machine do not fit together.
    """
    join(run.distributed)
    mesh = make_mesh(run.mesh)
    layout = BatchLayout(mesh, run.batch_size, run.accumulate, run.sequence_length)
    start = open_starting_point(run)
    source, config = start.source, start.config
    training = TextTraining(
        mesh=mesh,
        optimizer=run.optimizer,
        steps=run.loop.steps,
        seed=run.seed,
        config=config,
        layout=layout,
        compute=run.compute,
        lora=run.lora,
        source=source,
        peak_flops=peak_flops(mesh.size),
    )
    require_mesh(config, mesh, TRAINING)
    if run.compute.attention.strategy == "ulysses":
        require_heads(config.num_heads // mesh.shape[TENSOR], mesh.shape[SEQUENCE])
    vqgan = _open_vqgan(run, config, source)
    _require_directory(run)
    require_tracking(run.tracking)
    require_all_devices(mesh)
    copies_base = source is not None and source.format == "run" and run.lora.rank > 0
    base = source.absolute_source if source else ""
    if copies_base:
        base = str((run.out / BASE).resolve())
    with ExitStack() as stack:
        batches, held_out = _open_data(run, start, layout.rows, stack)
        training.require_memory()
        return learn(
            run,
            training,
            batches,
            held_out,
            facts={
                "model": to_dict(config),
                "lora": to_dict(run.lora) if run.lora.rank else None,
                "init": base,
            },
            description=f"training {params.count(training.specs):,} of "
            f"{params.count(training.model_specs):,} parameters on {mesh.size} "
            f"{jax.devices()[0].platform} device{'s' * (mesh.size > 1)}, {run.batch_size} x "
            f"{run.sequence_length:,} tokens per step",
            save_inputs=partial(
                _save_inputs, run, start.tokenizer, vqgan, source if copies_base else None,
                resumes=_resumes(run),
            ),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """Hold what a run starts from.

    Args:
        source: the checkpoint whose weights it takes; None for random weights.
        config: the configuration of the model to train.
    """

    source: Checkpoint | None
    config: LlamaConfig
    tokenizer: Tokenizer


def open_starting_point(run: TrainingRun) -> StartingPoint:
    """Open what a run starts from, without loading weights."""
    source = _open_source(run)
    config = run.model.resolve(run.sequence_length, source.config if source else None, run.init)
    if run.lora.rank and source is None:
        raise ConfigError(
            f"lora.rank is {run.lora.rank} but no model is named; name the model to adapt with "
            "--init"
        )
    tokenizer = _open_tokenizer(run, config, source)
    return StartingPoint(source=source, config=config, tokenizer=tokenizer)


def _resumes(run: TrainingRun) -> bool:
    """Return whether the run resumes from a checkpoint, so that its inputs must stay."""
    return not run.fresh and bool(complete_checkpoints(run.out))


def _open_source(run: TrainingRun) -> Checkpoint | None:
    """Open the model to start from; a resumed run of adapters has a copy of it."""
    if not run.init:
        return None
    if run.lora.rank and (run.out / BASE).is_dir() and _resumes(run):
        say(f"the adapters in {run.out} are added to the model in {run.out / BASE}")
        return open_checkpoint(str(run.out / BASE))
    return open_checkpoint(run.init)


def _open_tokenizer(run: TrainingRun, config: LlamaConfig, source: Checkpoint | None) -> Tokenizer:
    """Open the named tokenizer, that of the resumed run or of the model to start from, or train
    one on the data."""
    saved = run.out / TOKENIZER
    resumed = read_tokenizer(saved) if saved.is_dir() and _resumes(run) else None
    if run.tokenizer:
        named = read_tokenizer(Path(run.tokenizer))
        if resumed is not None and named.backend.to_str() != resumed.backend.to_str():
            raise ConfigError(
                f"{run.out} was begun with another tokenizer than {run.tokenizer}; start from the "
                "beginning with --fresh, or use another --out"
            )
        return named
    if resumed is not None:
        return resumed
    if source is None:
        say(f"training a tokenizer of {config.vocab_size:,} tokens on the data")
        examples = islice(training_texts(run.data, config.vision), TOKENIZER_TEXTS)
        return train_tokenizer(examples, config.vocab_size)
    if (tokenizer := checkpoint_tokenizer(source.vocabulary)) is None:
        raise ConfigError(
            f"--init {run.init} has no tokenizer; add --tokenizer with a tokenizer.json, a "
            "tokenizer.model or a directory that holds one"
        )
    return tokenizer


def _open_vqgan(
    run: TrainingRun, config: LlamaConfig, source: Checkpoint | None
) -> tuple[VQGANConfig, VQGAN] | None:
    """Open the VQGAN that is named, or that comes with the model or the resumed run, if any."""
    saved = run.out / VQGAN_DIRECTORY
    resumed = read_vqgan(saved) if saved.is_dir() and _resumes(run) else None
    path = Path(run.vqgan) if run.vqgan else source.vqgan if source else None
    if path is None:
        return resumed
    vqgan = read_vqgan(path)
    require_codebook(vqgan[0], str(path), config, "the model to train")
    if resumed is not None and not _equal(vqgan, resumed):
        raise ConfigError(
            f"{run.out} was begun with another VQGAN than {path}; start from the beginning with "
            "--fresh, or use another --out"
        )
    return vqgan


def _equal(one: tuple[VQGANConfig, VQGAN], other: tuple[VQGANConfig, VQGAN]) -> bool:
    return one[0] == other[0] and all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True)
    )


def _require_directory(run: TrainingRun) -> None:
    require_run(run.out)
    if run.init:
        init = Path(run.init).resolve()
        if run.out.resolve() in (init, *init.parents):
            raise ConfigError(
                f"--init {run.init} is inside {run.out}, which this run writes to; choose another "
                "--out"
            )


def _open_data(
    run: TrainingRun, start: StartingPoint, rows: list[int], stack: ExitStack
) -> tuple[BatchSource, HeldOut | None]:
    """Open the training split, and the held-out split if the run evaluates."""
    loader = partial(
        Loader, tokenizer=start.tokenizer, sequence_length=run.sequence_length, rows=rows,
        batch_size=run.batch_size, vocab_size=start.config.vocab_size, vision=start.config.vision,
    )  # fmt: skip
    batches = stack.enter_context(closing(loader(run.data)))
    if not run.loop.evaluate_every:
        return batches, None
    if not run.data.held_out:
        raise ConfigError(
            f"evaluate_every is {run.loop.evaluate_every} but nothing is held out; set "
            "--data.held-out to a share such as 0.01, or --evaluate-every 0"
        )
    plain = replace(run.data, shuffle=False, workers=0, drop_prompt=0.0)
    evaluation = stack.enter_context(closing(loader(plain, split="evaluation")))
    beginning = evaluation.get_state()

    def held_out() -> Iterator[dict[str, np.ndarray]]:
        evaluation.set_state(beginning)
        return evaluation

    return batches, held_out


def _save_inputs(
    run: TrainingRun,
    tokenizer: Tokenizer,
    vqgan: tuple[VQGANConfig, VQGAN] | None,
    base: Checkpoint | None,
    *,
    resumes: bool,
) -> None:
    """Save tokenizer, VQGAN, and the model that adapters are added to, in the run's directory."""
    if not resumes:  # a run that ended before its first checkpoint may have left others
        for name in (TOKENIZER, VQGAN_DIRECTORY, BASE):
            shutil.rmtree(run.out / name, ignore_errors=True)
    if not (run.out / TOKENIZER).is_dir():
        with new_directory(run.out / TOKENIZER) as directory:
            tokenizer.save(directory)
    if vqgan is not None and not (run.out / VQGAN_DIRECTORY).is_dir():
        write_vqgan(run.out / VQGAN_DIRECTORY, *vqgan)
    if base is not None and not (run.out / BASE).is_dir():
        write_checkpoint(
            base, run.out / BASE, form="lwm", dtype="float32", save_tokenizer=tokenizer.save
        )
