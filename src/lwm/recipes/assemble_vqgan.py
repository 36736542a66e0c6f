"""Put together a run that trains a VQGAN, in the order of `assemble`, and start it."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lwm.checkpoints.formats.vqgan import read_vqgan
from lwm.core import params
from lwm.core.config import to_dict
from lwm.core.errors import ConfigError
from lwm.core.hardware import precise
from lwm.core.mesh import make_mesh
from lwm.core.sharding import TRAINING, shard_count
from lwm.data.images import Crops, evaluation_batches, read_image_files, split_files
from lwm.media.images import to_pixels, write_image
from lwm.models.vqgan import VQGAN, decode_images, encode_images
from lwm.recipes.directory import require_run
from lwm.recipes.learn import learn
from lwm.recipes.settings import VqganRun
from lwm.training.metrics import require_tracking
from lwm.training.vqgan.training import VqganState, VqganTraining

GRID = "reconstructions.png"
_GRID_IMAGES = 16


def train_vqgan(run: VqganRun) -> Path:
    """Train from the beginning or from the last checkpoint; return the run's directory."""
    mesh = make_mesh(run.mesh)
    parts = shard_count(mesh, "batch", TRAINING)
    if run.batch_size % parts:
        raise ConfigError(
            f"batch_size ({run.batch_size}) cannot be divided by the {parts} parts of the mesh's "
            f"data and fsdp axes; choose a multiple of {parts}"
        )
    require_run(run.out)
    require_tracking(run.tracking)
    weights = _initial_weights(run)
    files, held_out_files = split_files(run.data)
    size = run.model.image_size
    images = _joined(read_image_files(files, run.data.source_size, run.data.frames))
    held_out = None
    if held_out_files:
        held_out = _joined(read_image_files(held_out_files, size, run.data.frames))
    training = VqganTraining(
        mesh=mesh,
        optimizer=run.optimizer,
        steps=run.loop.steps,
        seed=run.seed,
        show=None if held_out is None else Grid(run, held_out),
        config=run.model,
        codebook=run.codebook,
        reconstruction=run.reconstruction,
        weights=weights,
    )
    return learn(
        run,
        training,
        Crops(images, run.data, size=run.side, batch_size=run.batch_size),
        None if held_out is None else partial(evaluation_batches, held_out, run.batch_size),
        facts={"vqgan": to_dict(run.model)},
        description=f"training {params.count(training.specs):,} parameters on {len(images):,} "
        f"images of {len(files)} files, with {0 if held_out is None else len(held_out):,} images "
        f"of {len(held_out_files)} files held out; an image of {size} x {size} becomes "
        f"{run.model.codes_per_frame} codes",
    )


def _initial_weights(run: VqganRun) -> VQGAN | None:
    if not run.init:
        return None
    config, weights = read_vqgan(Path(run.init))
    if config != run.model:
        has, asked = to_dict(config), to_dict(run.model)
        name = next(name for name in has if has[name] != asked[name])
        raise ConfigError(
            f"--init {run.init} has {name} {has[name]}, but this run has {asked[name]}; set "
            f"--model.{name.replace('_', '-')} to {has[name]}"
        )
    return weights


def _joined(images: Iterator[tuple[Path, np.ndarray]]) -> np.ndarray:
    return np.concatenate([squares for _, squares in images])


class Grid:
    """Write held-out images beside their reconstructions to the run's directory."""

    def __init__(self, run: VqganRun, held_out: np.ndarray) -> None:
        rows = np.linspace(0, len(held_out) - 1, min(_GRID_IMAGES, len(held_out))).astype(int)
        self._images, self._file = held_out[rows], run.out / GRID

        def reconstruct(weights: VQGAN, pixels: jax.Array) -> jax.Array:
            codes = encode_images(weights, pixels, run.model)
            return decode_images(weights, codes, run.model)

        self._reconstruct = jax.jit(precise(reconstruct, jnp.float32))

    def __call__(self, step: int, state: VqganState) -> None:
        pixels = self._images.astype(np.float32) / 127.5 - 1
        reconstructions = to_pixels(np.asarray(self._reconstruct(state.weights, pixels)))
        write_image(self._file, grid(self._images, reconstructions))


def grid(originals: np.ndarray, reconstructions: np.ndarray, *, pairs: int = 4) -> np.ndarray:
    """Arrange images in one: each original left of its reconstruction, `pairs` in a row."""
    edge = 2
    both = np.concatenate([originals, reconstructions], axis=2)
    both = np.pad(both, ((0, 0), (edge, edge), (edge, edge), (0, 0)), constant_values=255)
    missing = -len(both) % pairs
    both = np.pad(both, ((0, missing), (0, 0), (0, 0), (0, 0)), constant_values=255)
    rows = [np.concatenate(list(row), axis=1) for row in both.reshape(-1, pairs, *both.shape[1:])]
    return np.concatenate(rows)
