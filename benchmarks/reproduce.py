"""Test the whole pipeline: tokenize real images and videos, memorize them, and reproduce them.

The benchmark crops 64 images and 64 clips from the photographs and videos of `lwm[pictures]` and
gives them captions. `lwm tokenize` encodes them, and `lwm train vision-debug` trains a model on
them in both directions, with masked packing. At temperature 0 the trained model must then generate
the codes of each image or clip from its caption, and the caption from the file. The first frame of
each clip is also trained on as an image, because video generation begins with an image.

usage: python benchmarks/reproduce.py VQGAN WORK [--steps 1500] [--pictures FILE] [train settings]
WORK is the directory to create; run the same command again to resume.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import lwm
from lwm.checkpoints.formats.vqgan import read_vqgan, write_vqgan
from lwm.data.images import split_files
from lwm.data.text.vision_texts import description_request
from lwm.media.images import is_image, read_image, write_image
from lwm.media.videos import is_video, read_video, write_video
from lwm.recipes.catalogue.small import vqgan_64

SIDE, FRAMES, COUNT = 32, 4, 64
PLACES = {
    "upper left": (0.0, 0.0), "upper right": (0.0, 1.0), "middle": (0.5, 0.5),
    "lower left": (1.0, 0.0), "lower right": (1.0, 1.0), "whole": None,
}  # fmt: skip


def lwm_command(*arguments: Any) -> None:
    print("lwm", *arguments, file=sys.stderr)
    subprocess.run([sys.executable, "-m", "lwm", *map(str, arguments)], check=True)


def cut(pixels: np.ndarray, place: tuple[float, float] | None, share: float = 0.6) -> np.ndarray:
    """Crop the same part of square images [..., side, side, 3] and resize it to `SIDE`."""
    side = pixels.shape[-2]
    if place is not None:
        part = int(side * share)
        top, left = (int((side - part) * x) for x in place)
        pixels = pixels[..., top : top + part, left : left + part, :]
    flat = pixels.reshape(-1, *pixels.shape[-3:])
    small = [np.array(Image.fromarray(one).resize((SIDE, SIDE))) for one in flat]
    return np.stack(small).reshape(*pixels.shape[:-3], SIDE, SIDE, 3)


def images(files: list[Path]) -> Iterator[tuple[str, np.ndarray]]:
    for place, at in PLACES.items():
        for file in files:
            yield f"the {place} of {file.stem}", cut(read_image(file, 256), at)


def clips(files: list[Path]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield clips of one second at four frames per second."""
    for second in range(10):
        for place, at in PLACES.items():
            for file in files:
                frames = read_video(file, 256, fps=4.0)[second * FRAMES :][:FRAMES]
                if len(frames) == FRAMES:
                    yield f"second {second} of {file.stem}, {place}", cut(frames, at)


def distinct(captioned: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Skip images that look like an earlier one, because their captions would be ambiguous."""
    earlier: list[np.ndarray] = []
    for caption, pixels in captioned:
        if all(np.abs(pixels.astype(float) - other).mean() > 4 for other in earlier):
            earlier.append(pixels)
            yield caption, pixels


def make_files(work: Path) -> None:
    training, held_out = split_files(vqgan_64().data)
    files = training + held_out
    photographs = [file for file in files if is_image(file)]
    videos = [file for file in files if is_video(file) and "distorted" not in file.stem]
    for caption, pixels in islice(distinct(images(photographs)), COUNT):
        save(work / "images" / f"{caption}.png", caption, pixels)
    for caption, pixels in islice(distinct(clips(videos)), COUNT):
        save(work / "clips" / f"{caption}.mp4", caption, pixels)
        first = read_video(work / "clips" / f"{caption}.mp4", SIDE)[0]
        save(work / "firsts" / f"{caption}.png", caption, first)


def save(path: Path, caption: str, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (write_image if path.suffix == ".png" else write_video)(path, pixels)
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def generated_codes(model: lwm.Model, caption: str, frames: int) -> np.ndarray:
    """Return the most likely codes of an image or video for a caption, [frames, codes]."""
    generated: dict[int, np.ndarray] = {}

    def record(_: int, frame: int, codes: np.ndarray) -> None:
        generated[frame] = codes

    how: dict[str, Any] = {"temperature": 0.0, "guidance": 1.0, "frame_done": record}
    if frames == 1:
        model.image(caption, **how)
    else:
        model.video(caption, frames=frames, **how)
    return np.stack([generated[frame] for frame in sorted(generated)])


def measure(model: lwm.Model, tokens: Path, folder: Path) -> dict[str, float]:
    """Return the shares of codes and of captions that are reproduced exactly."""
    exact, captions = [], []
    for line in tokens.read_text(encoding="utf-8").splitlines():
        example = json.loads(line)
        codes = np.array(example["vision"])
        frames = len(codes) // model.codec.config.codes_per_frame
        exact.append(generated_codes(model, example["caption"], frames).ravel() == codes)
        kind = "image" if frames == 1 else "video"
        shown = {"type": kind, kind: folder / example["source"]}
        if kind == "video":
            shown["fps"] = 4.0
        ask = {"type": "text", "text": description_request(f"an {kind}")}
        answer = model.chat([{"role": "user", "content": [ask, shown]}], max_tokens=80)
        captions.append(answer == example["caption"])
        print(f"{np.mean(exact[-1]):.3f} {captions[-1]} {example['caption']}", file=sys.stderr)
    return {"codes": float(np.concatenate(exact).mean()), "captions": float(np.mean(captions))}


def write_comparison(model: lwm.Model, work: Path, out: Path) -> None:
    """Write originals above the reproductions from their captions: eight images, two clips."""
    columns = []
    paths = sorted((work / "images").glob("*.png"))[:: COUNT // 8][:8]
    for path in paths:
        generated = model.image(path.stem, temperature=0.0, guidance=1.0)
        columns.append(np.concatenate([read_image(path, SIDE), generated]))
    for path in sorted((work / "clips").glob("*.mp4"))[:: COUNT // 2][:2]:
        generated = model.video(path.stem, frames=FRAMES, temperature=0.0, guidance=1.0)
        both = np.concatenate([read_video(path, SIDE), generated], axis=1)
        columns += list(both)
    sheet = np.concatenate([np.pad(one, ((1, 1), (1, 1), (0, 0))) for one in columns], axis=1)
    write_image(out, sheet.repeat(3, axis=0).repeat(3, axis=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vqgan", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--pictures", type=Path, help="image file to write the results to")
    arguments, settings = parser.parse_known_args()
    work = arguments.work
    if not (work / "vqgan").is_dir():
        config, weights = read_vqgan(arguments.vqgan)  # convolutions fit any size
        write_vqgan(work / "vqgan", replace(config, image_size=SIDE), weights)
        make_files(work)
    for name in ("images", "clips", "firsts"):
        if not (work / f"{name}.jsonl").is_file():
            lwm_command(
                "tokenize", work / name, "--vqgan", work / "vqgan", "--out", work / f"{name}.jsonl"
            )
    vision = lwm.load_vqgan(work / "vqgan").config
    started = time.perf_counter()
    lwm_command(
        "train", "vision-debug", "--out", work / "run", "--vqgan", work / "vqgan",
        "--steps", arguments.steps, "--model.vocab-size", 512,
        "--model.vision.codes", vision.codebook_size,
        "--model.vision.codes-per-frame", vision.codes_per_frame,
        "--model.vision.size", vision.codebook_size + 256,
        "--data.mixture.draw.path", work / "*.jsonl",
        "--data.mixture.draw.fields", "[drawing],vision",
        "--data.mixture.draw.weight", 3,
        "--data.mixture.tell.path", work / "[ci]*.jsonl",
        "--data.mixture.tell.fields", "[question+vision+closing],caption",
        "--data.drop-prompt", 0, "--optimizer.weight-decay", 0, "--data.loss-weights", "token",
        *settings,
    )  # fmt: skip
    minutes = (time.perf_counter() - started) / 60
    model = lwm.load(work / "run")
    print(f"trained for {minutes:.1f} minutes in this call")
    for name in ("images", "clips"):
        shares = measure(model, work / f"{name}.jsonl", work / name)
        print(
            f"{name}: codes exact {shares['codes']:.1%}, captions exact {shares['captions']:.1%}"
        )
    if arguments.pictures:
        write_comparison(model, work, arguments.pictures)


if __name__ == "__main__":
    main()
