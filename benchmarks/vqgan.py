"""Measure a trained VQGAN on held-out images, and the speedup from encoding in batches.

    python benchmarks/vqgan.py runs/vqgan --grid docs/vqgan.png

The benchmark reads the held-out files of the `vqgan` recipe (`lwm[pictures]`). It prints PSNR and
SSIM of each file, the number of codebook entries used, and the images encoded per second, one at a
time and in batches.
"""

import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tyro

import lwm
from lwm.data.images import read_image_files, split_files
from lwm.media.images import to_pixels, write_image
from lwm.models.likeness import psnr, ssim
from lwm.recipes.assemble_vqgan import grid
from lwm.recipes.catalogue.index import vqgan_recipe


def likeness(codec: lwm.VqganCodec, frames: int, picture: Path | None) -> None:
    _, held_out = split_files(vqgan_recipe("vqgan").data)
    counts = np.zeros(codec.config.codebook_size, int)
    shown: list[tuple[np.ndarray, np.ndarray]] = []
    figures: dict[str, list[float]] = {"images": [], "videos": []}
    for file, pictures in read_image_files(held_out, codec.config.image_size, frames):
        pixels = pictures.astype(np.float32) / 127.5 - 1
        codes = codec.encode(pixels)
        back = codec.decode(codes)
        counts += np.bincount(codes.ravel(), minlength=len(counts))
        ratios = np.asarray(psnr(jnp.asarray(pixels), jnp.asarray(back)))
        alike = np.asarray(ssim(jnp.asarray(pixels), jnp.asarray(back)))
        print(f"{file.name}: {len(pictures)} images, PSNR {ratios.mean():.2f} dB (least "
              f"{ratios.min():.2f}), SSIM {alike.mean():.3f}")  # fmt: skip
        figures["images" if len(pictures) == 1 else "videos"] += ratios.tolist()
        some = np.linspace(0, len(pictures) - 1, min(3, len(pictures))).astype(int)
        shown += [(pictures[i], to_pixels(back[i])) for i in some]
    for kind, values in figures.items():
        print(f"held-out {kind}: mean PSNR {np.mean(values):.2f} dB over {len(values)} images")
    shares = counts[counts > 0] / counts.sum()
    print(f"{(counts > 0).sum()} of {len(counts)} entries used, perplexity "
          f"{np.exp(-(shares * np.log(shares)).sum()):.0f}")  # fmt: skip
    if picture is not None:
        originals, backs = (np.stack(column) for column in zip(*shown, strict=True))
        write_image(picture, grid(originals, backs))


def rate(codec: lwm.VqganCodec, count: int, rounds: int) -> None:
    size = codec.config.image_size
    pixels = np.random.default_rng(0).uniform(-1, 1, (count, size, size, 3)).astype(np.float32)

    def alone() -> None:
        for picture in pixels:
            codec.encode(picture[None])

    def together() -> None:
        codec.encode(pixels)

    codec.encode(pixels[:1])
    codec.encode(pixels)
    seconds: dict[str, list[float]] = {"one at a time": [], "in batches": []}
    for _ in range(rounds):  # in turn, so that other load on the machine affects both
        for name, work in (("one at a time", alone), ("in batches", together)):
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        print(f"encoding {name}: {count / np.median(values):,.1f} images/s")
    ratios = np.divide(seconds["one at a time"], seconds["in batches"])
    print(f"ratio {np.median(ratios):.2f} (rounds {ratios.min():.2f} to {ratios.max():.2f})")


def main(
    vqgan: tyro.conf.Positional[Path],
    frames: int = 32,
    count: int = 64,
    rounds: int = 7,
    grid: Path | None = None,
) -> None:
    """Measure a VQGAN on held-out images.

    Args:
        vqgan: Directory of a VQGAN or of a training run.
        frames: Number of frames of each held-out video.
        count: Number of images to encode for the timing.
        rounds: Number of timing rounds.
        grid: File to write originals and reconstructions to.
    """
    codec = lwm.load_vqgan(vqgan)
    likeness(codec, frames, grid)
    rate(codec, count, rounds)


if __name__ == "__main__":
    tyro.cli(main)
