"""Put together a run that trains a language model, and start it.

Order: join the other processes, check all settings, open model, tokenizer and data, compile,
resume, train. Everything that can be refused is checked before anything is written.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lwm.attention.api import require_heads
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
from lwm.data.splits import training_texts
from lwm.data.text.tokenizer import (
    Tokenizer,
    checkpoint_tokenizer,
    read_tokenizer,
    train_tokenizer,
)
from lwm.models.llama import LlamaConfig, require_mesh
from lwm.models.vqgan import VQGAN, VQGANConfig
from lwm.recipes.learn import learn, require_run
from lwm.recipes.settings import TrainingRun
from lwm.training.batches import BatchLayout
from lwm.training.loop import HeldOut
from lwm.training.text import TextTraining

_TOKENIZER_TEXTS = 20_000  # the most examples that a tokenizer is trained on


def train_model(run: TrainingRun) -> Path:
    """Train from the beginning or from the last checkpoint; return the run's directory, a MODEL.

    Raises LwmError, before anything is written, if settings, data or machine do not fit together.
    """
    join(run.distributed)
    mesh = make_mesh(run.mesh)
    layout = BatchLayout(mesh, run.batch_size, run.accumulate, run.sequence_length)
    start = open_starting_point(run)
    training = TextTraining(
        mesh=mesh,
        optimizer=run.optimizer,
        steps=run.loop.steps,
        seed=run.seed,
        config=start.config,
        layout=layout,
        compute=run.compute,
        lora=run.lora,
        source=start.source,
        peak_flops=peak_flops(mesh.size),
    )
    require_mesh(start.config, mesh, TRAINING)
    if run.compute.attention.strategy == "ulysses":
        require_heads(start.config.num_heads // mesh.shape[TENSOR], mesh.shape[SEQUENCE])
    vqgan = _open_vqgan(run, start)
    require_run(run)
    require_all_devices(mesh)
    with ExitStack() as stack:
        batches, held_out = _open_data(run, start, layout.rows, stack)
        training.require_memory()
        return learn(
            run,
            training,
            batches,
            held_out,
            facts=_facts(run, start),
            description=f"training {params.count(training.specs):,} of "
            f"{params.count(training.model_specs):,} parameters on {mesh.size} "
            f"{jax.devices()[0].platform} device{'s' * (mesh.size > 1)}, {run.batch_size} x "
            f"{run.sequence_length:,} tokens per step",
            save_inputs=partial(_save_inputs, run, start, vqgan),
        )


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """Hold what a run starts from; without a source, from random weights."""

    source: Checkpoint | None
    config: LlamaConfig
    tokenizer: Tokenizer


def open_starting_point(run: TrainingRun) -> StartingPoint:
    """Open what a run starts from, without loading weights."""
    source = _open_source(run)
    config = run.model.resolve(run.sequence_length, source.config if source else None, run.init)
    if run.lora.rank and source is None:
        raise ConfigError(f"lora.rank is {run.lora.rank} but --init names no model to adapt")
    tokenizer = _open_tokenizer(run, config, source)
    return StartingPoint(source=source, config=config, tokenizer=tokenizer)


def _facts(run: TrainingRun, start: StartingPoint) -> dict[str, Any]:
    base = start.source.absolute_source if start.source else ""
    if _copies_base(run, start):
        base = str((run.out / BASE).resolve())
    lora = to_dict(run.lora) if run.lora.rank else None
    return {"model": to_dict(start.config), "lora": lora, "init": base}


def _copies_base(run: TrainingRun, start: StartingPoint) -> bool:
    return run.lora.rank > 0 and start.source is not None and start.source.format == "run"


def _saved(run: TrainingRun, name: str) -> Path | None:
    """Return an input in the run's directory, if the run resumes from a checkpoint."""
    resumes = not run.fresh and complete_checkpoints(run.out)
    return run.out / name if resumes and (run.out / name).is_dir() else None


def _open_source(run: TrainingRun) -> Checkpoint | None:
    """Open the model to start from; a resumed run of adapters has a copy of it."""
    if not run.init:
        return None
    init = Path(run.init).resolve()
    if run.out.resolve() in (init, *init.parents):
        raise ConfigError(f"--init {run.init} is inside {run.out}; choose another --out")
    if run.lora.rank and (base := _saved(run, BASE)):
        say(f"the adapters in {run.out} are added to the model in {base}")
        return open_checkpoint(str(base))
    return open_checkpoint(run.init)


def _open_tokenizer(run: TrainingRun, config: LlamaConfig, source: Checkpoint | None) -> Tokenizer:
    saved = _saved(run, TOKENIZER)
    resumed = read_tokenizer(saved) if saved else None
    if run.tokenizer:
        named = read_tokenizer(Path(run.tokenizer))
        if resumed is not None and named.backend.to_str() != resumed.backend.to_str():
            raise _begun_with_another(run, "tokenizer", run.tokenizer)
        return named
    if resumed is not None:
        return resumed
    if source is None:
        say(f"training a tokenizer of {config.vocab_size:,} tokens on the data")
        examples = islice(training_texts(run.data, config.vision), _TOKENIZER_TEXTS)
        return train_tokenizer(examples, config.vocab_size)
    if (tokenizer := checkpoint_tokenizer(source.vocabulary)) is None:
        raise ConfigError(
            f"--init {run.init} has no tokenizer; add --tokenizer with a tokenizer.json, a "
            "tokenizer.model or a directory that holds one"
        )
    return tokenizer


def _open_vqgan(run: TrainingRun, start: StartingPoint) -> tuple[VQGANConfig, VQGAN] | None:
    """Open the VQGAN that is named, or that comes with the model or the resumed run, if any."""
    saved = _saved(run, VQGAN_DIRECTORY)
    resumed = read_vqgan(saved) if saved else None
    path = Path(run.vqgan) if run.vqgan else start.source.vqgan if start.source else None
    if path is None:
        return resumed
    config, weights = read_vqgan(path)
    require_codebook(config, str(path), start.config, "the model to train")
    if resumed is not None and not (
        config == resumed[0] and jax.tree.all(jax.tree.map(np.array_equal, weights, resumed[1]))
    ):
        raise _begun_with_another(run, "VQGAN", str(path))
    return config, weights


def _begun_with_another(run: TrainingRun, kind: str, path: str) -> ConfigError:
    return ConfigError(
        f"{run.out} was begun with another {kind} than {path}; start from the beginning with "
        "--fresh, or use another --out"
    )


def _open_data(
    run: TrainingRun, start: StartingPoint, rows: list[int], stack: ExitStack
) -> tuple[Loader, HeldOut | None]:
    """Open the training split, and the held-out split if the run evaluates."""
    loader = partial(
        Loader, tokenizer=start.tokenizer, sequence_length=run.sequence_length, rows=rows,
        batch_size=run.batch_size, vocab_size=start.config.vocab_size, vision=start.config.vision,
    )  # fmt: skip
    batches = stack.enter_context(loader(run.data))
    if sentence := batches.describe_long_examples():
        say(sentence)
    if not run.loop.evaluate_every:
        return batches, None
    if not run.data.held_out:
        raise ConfigError(
            f"evaluate_every is {run.loop.evaluate_every} but nothing is held out; set "
            "--data.held-out to a share such as 0.01, or --evaluate-every 0"
        )
    plain = replace(run.data, shuffle=False, workers=0, drop_prompt=0.0)
    evaluation = stack.enter_context(loader(plain, split="evaluation"))
    if sentence := evaluation.describe_long_examples():
        say(f"for evaluation, {sentence}")
    beginning = evaluation.get_state()

    def held_out() -> Iterator[dict[str, np.ndarray]]:
        evaluation.set_state(beginning)
        return evaluation

    return batches, held_out


def _save_inputs(
    run: TrainingRun, start: StartingPoint, vqgan: tuple[VQGANConfig, VQGAN] | None
) -> None:
    """Save tokenizer, VQGAN, and the model that adapters are added to, in the run's directory."""
    for name in (TOKENIZER, VQGAN_DIRECTORY, BASE):
        if not _saved(run, name):  # left by a run that ended before its first checkpoint
            shutil.rmtree(run.out / name, ignore_errors=True)
    tokenizer, base = start.tokenizer, start.source
    if not (run.out / TOKENIZER).is_dir():
        with new_directory(run.out / TOKENIZER) as directory:
            tokenizer.save(directory)
    if vqgan is not None and not (run.out / VQGAN_DIRECTORY).is_dir():
        write_vqgan(run.out / VQGAN_DIRECTORY, *vqgan)
    if base is not None and _copies_base(run, start) and not (run.out / BASE).is_dir():
        write_checkpoint(
            base, run.out / BASE, form="lwm", dtype="float32", save_tokenizer=tokenizer.save
        )
