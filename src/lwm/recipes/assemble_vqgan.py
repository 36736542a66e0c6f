"""Put together a run that trains a VQGAN, in the order of `assemble`, and start it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from lwm.checkpoints.formats.vqgan import read_vqgan
from lwm.core import params
from lwm.core.config import to_dict
from lwm.core.errors import ConfigError
from lwm.core.hardware import precise
from lwm.core.mesh import make_mesh
from lwm.core.sharding import TRAINING, shard_count
from lwm.data.images import Crops, evaluation_batches, read_image_files, split_files
from lwm.media.images import to_pixels, to_unit, write_image
from lwm.models.vqgan import VQGAN, decode_images, encode_images
from lwm.recipes.learn import learn, require_run
from lwm.recipes.settings import VqganRun, require_equal
from lwm.training.vqgan import VqganState, VqganTraining

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
    require_run(run)
    weights = None
    if run.init:
        config, weights = read_vqgan(Path(run.init))
        require_equal(run.init, config, run.model)
    files, held_out_files = split_files(run.data)
    size = run.model.image_size
    images, files_read = _read(files, run.data.source_size, run.data.frames)
    held_out, held_out_read = _read(held_out_files, size, run.data.frames)
    evaluates = len(held_out) > 0
    training = VqganTraining(
        mesh=mesh,
        optimizer=run.optimizer,
        steps=run.loop.steps,
        seed=run.seed,
        show=_grid_writer(run, held_out) if evaluates else None,
        config=run.model,
        codebook=run.codebook,
        reconstruction=run.reconstruction,
        weights=weights,
    )
    return learn(
        run,
        training,
        Crops(images, run.data, size=run.side, batch_size=run.batch_size),
        partial(evaluation_batches, held_out, run.batch_size) if evaluates else None,
        facts={"vqgan": to_dict(run.model)},
        description=f"training {params.count(training.specs):,} parameters on {len(images):,} "
        f"images of {files_read} files, with {len(held_out):,} images of {held_out_read} "
        f"files held out; an image of {size} x {size} becomes {run.model.codes_per_frame} codes",
    )


def _read(
    files: Sequence[Path], size: int, frames: int
) -> tuple[UInt8[np.ndarray, "images size size 3"], int]:
    """Return the images of files, and the number of files that could be read."""
    images = [pixels for _, pixels in read_image_files(files, size, frames)]
    return np.concatenate([np.zeros((0, size, size, 3), np.uint8), *images]), len(images)


def _grid_writer(run: VqganRun, held_out: np.ndarray) -> Callable[[int, VqganState], None]:
    """Return a function that writes held-out images beside their reconstructions."""
    rows = np.linspace(0, len(held_out) - 1, min(_GRID_IMAGES, len(held_out))).astype(int)
    images = held_out[rows]

    def reconstruct(weights: VQGAN, pixels: jax.Array) -> jax.Array:
        return decode_images(weights, encode_images(weights, pixels, run.model), run.model)

    compiled = jax.jit(precise(reconstruct, jnp.float32))

    def show(step: int, state: VqganState) -> None:
        pixels = to_unit(images)
        reconstructions = to_pixels(np.asarray(compiled(state.weights, pixels)))
        write_image(run.out / GRID, grid(images, reconstructions))

    return show


def grid(originals: np.ndarray, reconstructions: np.ndarray, *, pairs: int = 4) -> np.ndarray:
    """Arrange images in one: each original left of its reconstruction, `pairs` in a row."""
    both = np.concatenate([originals, reconstructions], axis=2)
    margins = ((0, -len(both) % pairs), (2, 2), (2, 2), (0, 0))
    both = np.pad(both, margins, constant_values=255)
    rows = [np.concatenate(list(row), axis=1) for row in both.reshape(-1, pairs, *both.shape[1:])]
    return np.concatenate(rows)
