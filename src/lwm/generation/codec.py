"""Pictures to codes and back, in batches: what `lwm.load_vqgan` returns.

Places the weights once, cuts any number of pictures into batches of bounded size, and compiles
once for each size of batch. Knows numpy arrays; knows nothing of files of pictures.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from lwm.checkpoints.formats.vqgan import read_vqgan
from lwm.core.errors import InputError
from lwm.models.vqgan import VQGAN, VQGANConfig, decode_images, encode_images

BATCH_PIXELS = 1 << 20
"""Pixels of a batch; 16 pictures of 256 x 256. Bounds activations, not what may be asked for."""
CPU_BATCH_PIXELS = 1 << 15
"""The same on a CPU, where activations that outgrow its cache cost more than batches gain."""


class VqganCodec:
    """A VQGAN ready to use.

    Args:
        weights: arrays on the host or on a device.

    Attributes:
        config: sizes, among them `codebook_size`, `image_size` and `codes_per_frame`.
    """

    def __init__(self, config: VQGANConfig, weights: VQGAN) -> None:
        self.config = config
        self._weights = jax.device_put(weights, jax.local_devices()[0])
        self._encode = jax.jit(partial(encode_images, config=config))
        self._decode = jax.jit(partial(decode_images, config=config))

    @cached_property
    def fingerprint(self) -> str:
        """Tells two VQGANs apart by their sizes and weights."""
        found = hashlib.sha256(repr(self.config).encode())
        for leaf in jax.tree.leaves(self._weights):
            found.update(np.ascontiguousarray(leaf).data)
        return found.hexdigest()[:16]

    def encode(
        self, pixels: np.ndarray, *, batch: int | None = None
    ) -> Int[np.ndarray, "pictures rows columns"]:
        """Codes of pictures, by which `downsampling` pixels of a side become one code.

        Args:
            pixels: [pictures, height, width, 3], RGB in [-1, 1].
            batch: pictures computed at once, rounded down to a power of two; by `BATCH_PIXELS`
                unless given.

        Raises:
            InputError: the array is no batch of pictures in [-1, 1], or its sides cannot be
                divided.
        """
        pixels = np.asarray(pixels)
        if pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise InputError(
                f"pixels have shape {list(pixels.shape)}; [pictures, height, width, 3] is needed"
            )
        if not np.issubdtype(pixels.dtype, np.floating):
            raise InputError(
                f"pixels are {pixels.dtype}; turn them into floats in [-1, 1] with x / 127.5 - 1"
            )
        step = self.config.downsampling
        if any(side == 0 or side % step for side in pixels.shape[1:3]):
            raise InputError(
                f"pixels are {pixels.shape[1]} high and {pixels.shape[2]} wide; this VQGAN needs "
                f"multiples of {step}, resize or crop them"
            )
        if pixels.size and not np.abs(pixels).max() <= 1.001:  # also refuses what is no number
            raise InputError(
                f"pixels range from {pixels.min():.3g} to {pixels.max():.3g}; they must lie in "
                "[-1, 1]: x / 127.5 - 1 for bytes"
            )
        side = [n // step for n in pixels.shape[1:3]]
        pixels = pixels.astype(np.float32)
        return self._in_batches(self._encode, pixels, step, (*side,), np.int32, batch)

    def decode(self, codes: np.ndarray) -> Float[np.ndarray, "pictures height width 3"]:
        """Pictures in [-1, 1] of codes.

        Args:
            codes: integers, [pictures, rows, columns].

        Raises:
            InputError: the array is no batch of grids of codes, or holds others than the codebook
                has.
        """
        codes = np.asarray(codes)
        if codes.ndim != 3 or 0 in codes.shape[1:] or not np.issubdtype(codes.dtype, np.integer):
            raise InputError(
                f"codes are {codes.dtype} of shape {list(codes.shape)}; integers "
                "[pictures, rows, columns] are needed"
            )
        size = self.config.codebook_size
        if codes.size and (codes.min() < 0 or codes.max() >= size):
            wrong = codes.min() if codes.min() < 0 else codes.max()
            raise InputError(
                f"the code {wrong} is not in the codebook, which has the entries 0 to {size - 1}; "
                "these codes are of another VQGAN, or hold end tokens"
            )
        side = [n * self.config.downsampling for n in codes.shape[1:]]
        return self._in_batches(self._decode, codes.astype(np.int32), 1, (*side, 3), np.float32)

    def _in_batches(
        self,
        work: Any,
        x: np.ndarray,
        step: int,
        shape: tuple[int, ...],
        dtype: Any,
        batch: int | None = None,
    ) -> np.ndarray:
        out = np.empty((len(x), *shape), dtype)
        places = x.shape[1] * x.shape[2] * (self.config.downsampling // step) ** 2
        cpu = jax.devices()[0].platform == "cpu"
        bound = (CPU_BATCH_PIXELS if cpu else BATCH_PIXELS) // places
        most = 1 << max(0, (batch or bound).bit_length() - 1)
        workers = (os.cpu_count() or 1) if cpu else 1
        most = min(most, 1 << max(0, -(-len(x) // workers) - 1).bit_length())

        def compute(start: int) -> None:
            part = x[start : start + most]
            # Powers of two alone, so that few programs are compiled.
            rows = 1 << (len(part) - 1).bit_length()
            padded = np.concatenate([part, np.zeros((rows - len(part), *x.shape[1:]), x.dtype)])
            found = np.asarray(work(self._weights, padded))
            out[start : start + len(part)] = found[: len(part)]

        # A batch on each core of a CPU goes faster than one after another on all of them.
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(compute, range(0, len(x), most)))
        return out


def load_vqgan(path: str | Path, *, config: str | Path | None = None) -> VqganCodec:
    """A VQGAN from our directory, a training run, or the original's pickle.

    Args:
        config: for a pickle, a JSON file with the original's keys; its defaults unless given.

    Raises:
        CheckpointError: nothing is there, it is broken, or it is of another size.
        ConfigError: the settings are wrong.
    """
    found, weights = read_vqgan(Path(path), None if config is None else Path(config))
    return VqganCodec(found, weights)
