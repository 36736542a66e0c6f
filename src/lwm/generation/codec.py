"""Convert images to codes and back, in batches of bounded size."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import islice
from math import isqrt
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from lwm.checkpoints.formats.vqgan import read_vqgan
from lwm.core.config import check_arguments
from lwm.core.errors import ConfigError, InputError
from lwm.core.hardware import precise, traits
from lwm.core.progress import progress
from lwm.generation.vision_prompts import as_array
from lwm.media.images import to_pixels, to_unit
from lwm.models.vqgan import VQGAN, VQGANConfig, decode_images, encode_images

_FRAMES = 32  # frames of a video that are in memory at a time while it is encoded


@runtime_checkable
class ImageCodec(Protocol):
    """Convert pixels [n, height, width, 3] in [-1, 1] to codes [n, rows, columns] and back."""

    @property
    def config(self) -> Any: ...  # has an `image_size`, the side of the images

    def encode(self, pixels: Any, /) -> Any: ...

    def decode(self, codes: Any, /) -> Any: ...


class VqganCodec:
    """Encode and decode images with a VQGAN; each batch size compiles once.

    Args:
        weights: arrays on the host or on a device.

    Attributes:
        config: sizes, such as `codebook_size`, `image_size` and `codes_per_frame`.
    """

    def __init__(self, config: VQGANConfig, weights: VQGAN) -> None:
        self.config = config
        self._weights = jax.device_put(weights, jax.local_devices()[0])
        dtype = jax.tree.leaves(self._weights)[0].dtype
        self._encode = jax.jit(precise(partial(encode_images, config=config), dtype))
        self._decode = jax.jit(precise(partial(decode_images, config=config), dtype))

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of the sizes and weights."""
        digest = hashlib.sha256(repr(self.config).encode())
        for leaf in jax.tree.leaves(self._weights):
            digest.update(np.ascontiguousarray(leaf).data)
        return digest.hexdigest()[:16]

    def encode(
        self, pixels: np.ndarray, *, batch: int | None = None
    ) -> Int[np.ndarray, "images rows columns"]:
        """Compute the codes of images; `downsampling` pixels of a side become one code.

        Args:
            pixels: [images, height, width, 3], RGB in [-1, 1].
            batch: images per batch, rounded down to a power of two; defaults to the platform's.

        Raises:
            InputError: the array is no batch of images in [-1, 1] that divide into codes.
        """
        pixels, step = as_array(pixels), self.config.downsampling
        if pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise InputError(
                f"pixels have shape {list(pixels.shape)}; [images, height, width, 3] is needed"
            )
        if not np.issubdtype(pixels.dtype, np.floating):
            raise InputError(f"pixels are {pixels.dtype}; convert bytes with x / 127.5 - 1")
        height, width = pixels.shape[1:3]
        if height == 0 or width == 0 or height % step or width % step:
            raise InputError(
                f"pixels are {height} high and {width} wide; this VQGAN needs multiples of {step}"
            )
        if pixels.size and not np.abs(pixels).max() <= 1.001:  # also refuses NaN
            raise InputError(
                f"pixels range from {pixels.min():.3g} to {pixels.max():.3g}; they must lie in "
                "[-1, 1]: x / 127.5 - 1 for bytes"
            )
        result = np.empty((len(pixels), height // step, width // step), np.int32)
        self._in_batches(self._encode, pixels.astype(np.float32), result, height * width, batch)
        return result

    def decode(self, codes: np.ndarray) -> Float[np.ndarray, "images height width 3"]:
        """Compute images in [-1, 1] from codes, integers [images, rows, columns].

        Raises:
            InputError: the array is no batch of grids of codes of the codebook.
        """
        codes = as_array(codes)
        if codes.ndim != 3 or 0 in codes.shape[1:] or not np.issubdtype(codes.dtype, np.integer):
            raise InputError(
                f"codes are {codes.dtype} of shape {list(codes.shape)}; integers "
                "[images, rows, columns] are needed"
            )
        size = self.config.codebook_size
        if codes.size and (codes.min() < 0 or codes.max() >= size):
            wrong = codes.min() if codes.min() < 0 else codes.max()
            raise InputError(
                f"the code {wrong} is not in the codebook, which has the entries 0 to {size - 1}; "
                "use the codes of this VQGAN, without end tokens"
            )
        height, width = (n * self.config.downsampling for n in codes.shape[1:])
        result = np.empty((len(codes), height, width, 3), np.float32)
        self._in_batches(self._decode, codes.astype(np.int32), result, height * width, None)
        return result

    def _in_batches(
        self, compute: Any, inputs: np.ndarray, result: np.ndarray, area: int, batch: int | None
    ) -> None:
        """Fill `result` by batches of inputs, each of `area` pixels."""
        platform = traits()
        size = 1 << max(0, (batch or platform.codec_pixels // area).bit_length() - 1)
        workers = (os.cpu_count() or 1) if platform.codec_batches else 1
        size = min(size, 1 << max(0, -(-len(inputs) // workers) - 1).bit_length())

        def fill(start: int) -> None:
            part = inputs[start : start + size]
            # Powers of two only, so that few programs are compiled.
            rows = 1 << (len(part) - 1).bit_length()
            padding = np.zeros((rows - len(part), *inputs.shape[1:]), inputs.dtype)
            outputs = np.asarray(compute(self._weights, np.concatenate([part, padding])))
            result[start : start + len(part)] = outputs[: len(part)]

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, range(0, len(inputs), size)))


@check_arguments
def load_vqgan(path: str | Path, *, config: str | Path | None = None) -> VqganCodec:
    """Load a VQGAN from our directory, a training run, or the original's pickle.

    Args:
        config: for a pickle, a JSON file with the original's keys; defaults to its defaults.

    Raises:
        CheckpointError: the path does not exist, is broken, or is of another size.
        ConfigError: the settings are wrong.
    """
    return VqganCodec(*read_vqgan(Path(path), None if config is None else Path(config)))


def encode_frames(
    codec: ImageCodec, frames: Iterable[UInt8[np.ndarray, "height width 3"]]
) -> Int[np.ndarray, "frames codes_per_frame"]:
    """Compute the codes of frames, which may come from a generator."""
    remaining, parts = iter(frames), []
    with progress("encoding frames", None) as advance:
        while batch := list(islice(remaining, _FRAMES)):
            codes = codec.encode(to_unit(np.stack(batch)))
            parts.append(np.asarray(codes).reshape(len(batch), -1))
            advance(len(batch))
    return np.concatenate(parts)


def decode_frames(
    codec: ImageCodec, codes: Int[np.ndarray, "videos frames codes_per_frame"]
) -> UInt8[np.ndarray, "videos frames height width 3"]:
    """Compute the pixels of frames, from 0 to 255."""
    count = codes.shape[-1]
    side = isqrt(count)
    if side * side != count:
        raise ConfigError(f"a frame has {count} codes, which are not a square as a VQGAN's are")
    pixels = to_pixels(np.asarray(codec.decode(codes.reshape(-1, side, side))))
    return pixels.reshape(*codes.shape[:2], *pixels.shape[1:])
