"""Puts a run that trains a VQGAN together and starts it: the one place that sees a `VqganRun`.

The order is that of `assemble`: check, open, compile, resume, learn.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import jax
import numpy as np

from lwm.checkpoints.formats.vqgan import read_vqgan
from lwm.core import params
from lwm.core.config import to_dict
from lwm.core.errors import ConfigError
from lwm.core.mesh import make_mesh
from lwm.core.sharding import TRAINING, shard_count
from lwm.data.images import Crops, evaluation_batches, read_image_files, split_files
from lwm.media.images import to_pixels, write_image
from lwm.models.vqgan import VQGAN, decode_images, encode_images
from lwm.recipes.directory import make_run, require_run, require_same, write_settings
from lwm.recipes.learn import learn
from lwm.recipes.settings import VqganRun
from lwm.training.loop import Work
from lwm.training.metrics import require_tracking
from lwm.training.optimizer import learning_rate
from lwm.training.readings import VqganReading
from lwm.training.vqgan.step import VqganPlan, VqganState

GRID = "reconstructions.png"
_ROWS = 16
"""Pictures of the grid, evenly spread over those held out."""


def train_vqgan(run: VqganRun) -> Path:
    """Trains, from the beginning or from where the run's directory left off.

    Returns:
        The run's directory, which `lwm.load_vqgan` opens.

    Raises:
        ConfigError: settings contradict each other, the machine or the VQGAN to start from.
        InputError: the pictures cannot be used.
        CheckpointError: a checkpoint cannot be read or written.
    """
    mesh = make_mesh(run.mesh)
    parts = shard_count(mesh, "batch", TRAINING)
    if run.batch_size % parts:
        raise ConfigError(
            f"batch_size ({run.batch_size}) cannot be divided by the {parts} parts that the "
            f"mesh's data and fsdp axes cut it into; make it a multiple of {parts}"
        )
    require_run(run.out)
    require_tracking(run.tracking)
    weights = _start(run)
    learnt, kept = split_files(run.data)
    size = run.model.image_size
    pictures = _joined(read_image_files(learnt, run.data.source_size, run.data.frames))
    held = _joined(read_image_files(kept, size, run.data.frames)) if kept else None
    batches = Crops(pictures, run.data, size=run.side, batch_size=run.batch_size)
    plan = VqganPlan(
        config=run.model, mesh=mesh, optimizer=run.optimizer, codebook=run.codebook,
        reconstruction=run.reconstruction, steps=run.loop.steps, seed=run.seed,
    )  # fmt: skip
    facts = {"vqgan": to_dict(run.model)}
    rate = learning_rate(run.optimizer, run.loop.steps)
    work = Work(
        step=plan.step(),
        evaluate=plan.evaluate(),
        place=plan.place,
        batches=batches,
        held_out=None if held is None else partial(evaluation_batches, held, run.batch_size),
        learning_rates=np.asarray(jax.vmap(rate)(np.arange(run.loop.steps))),
        reading=VqganReading(pictures=run.batch_size),
        show=None if held is None else Grid(run, held),
    )

    def write() -> None:
        make_run(run.out, fresh=run.fresh)
        write_settings(run.out, {"run": to_dict(run), **facts})

    with ExitStack() as opened:
        return learn(
            run,
            work,
            opened,
            template=plan.template(),
            first_state=lambda: plan.first_state(weights),
            frozen=lambda: None,
            facts=facts,
            same=lambda found: require_same(run.out, found.get("vqgan") or {}, facts["vqgan"]),
            write_settings=write,
            about=f"training {params.count(plan.specs):,} parameters on {len(pictures):,} "
            f"pictures of {len(learnt)} files; {0 if held is None else len(held):,} of "
            f"{len(kept)} files are held out; a picture of {size} x {size} becomes "
            f"{run.model.codes_per_frame} codes",
        )


def _start(run: VqganRun) -> VQGAN | None:
    if not run.init:
        return None
    config, weights = read_vqgan(Path(run.init))
    if config != run.model:
        has, asked = to_dict(config), to_dict(run.model)
        name = next(name for name in has if has[name] != asked[name])
        raise ConfigError(
            f"--init {run.init} has {name} {has[name]}, but this run asks for {asked[name]}; set "
            f"--model.{name.replace('_', '-')} to what it has"
        )
    return weights


def _joined(found: Iterator[tuple[Path, np.ndarray]]) -> np.ndarray:
    return np.concatenate([pictures for _, pictures in found])


class Grid:
    """Originals beside reconstructions, written into the run's directory after each evaluation."""

    def __init__(self, run: VqganRun, held: np.ndarray) -> None:
        rows = np.linspace(0, len(held) - 1, min(_ROWS, len(held))).astype(int)
        self._pictures, self._file = held[rows], run.out / GRID
        self._through = jax.jit(
            lambda weights, pixels: decode_images(
                weights, encode_images(weights, pixels, run.model), run.model
            )
        )

    def __call__(self, step: int, state: VqganState) -> None:
        pixels = self._pictures.astype(np.float32) / 127.5 - 1
        back = to_pixels(np.asarray(self._through(state.weights, pixels)))
        write_image(self._file, grid(self._pictures, back))


def grid(originals: np.ndarray, reconstructions: np.ndarray, *, pairs: int = 4) -> np.ndarray:
    """One picture of all: each original with its reconstruction on its right, `pairs` a row."""
    both = np.concatenate([originals, reconstructions], axis=2)
    edge = 2
    both = np.pad(both, ((0, 0), (edge, edge), (edge, edge), (0, 0)), constant_values=255)
    rest = -len(both) % pairs
    both = np.pad(both, ((0, rest), (0, 0), (0, 0), (0, 0)), constant_values=255)
    rows = [np.concatenate(list(row), axis=1) for row in both.reshape(-1, pairs, *both.shape[1:])]
    return np.concatenate(rows)
