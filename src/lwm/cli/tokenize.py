"""Tokenize images and videos into training data: `lwm tokenize`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from lwm.core.errors import ConfigError
from lwm.core.progress import say


def tokenize(
    paths: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="PATH...", help="Folders of images and videos, or single files."),
    ],
    /,
    vqgan: Path,
    out: Path,
    vqgan_config: Path | None = None,
    captions: Path | None = None,
    uncaptioned: Literal["skip", "keep"] = "skip",
    max_frames: int | None = None,
    fps: float | None = 4.0,
    batch_size: int = 16,
    tokenizer: Path | None = None,
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
) -> None:
    """Encode captioned images and videos as training data.

    The caption of cat.jpg is the text in cat.txt beside it, or comes from --captions. Files that
    cannot be read or have no caption are listed and skipped. A repeated command continues an
    interrupted run, from OUT.partial.

    Args:
        vqgan: VQGAN that encodes images: a directory, a training run, or the original's pickle.
        out: File to write: .jsonl, .jsonl.gz, or .array_record, which holds tokens.
        vqgan_config: JSON file with the settings of a pickled VQGAN.
        captions: CSV or JSON lines with the columns file (relative to PATH or here) and caption.
        uncaptioned: Skip files without a caption, or keep them as images without a prompt.
        max_frames: Maximum number of frames of a video, evenly spaced; defaults to all.
        fps: Frames sampled from each second of a video; None takes every frame.
        batch_size: Number of frames to encode together, from one file or several.
        tokenizer: Tokenizer of the model to train, for .array_record.
        engine: Where frames are encoded: in this process (local) or on a Ray cluster (ray).
        workers: Number of Ray processes; defaults to one per GPU, or one per machine without GPUs.
    """
    from lwm.curation.captions import captioned_files
    from lwm.curation.tokenize import (
        FrameSettings,
        encode_locally,
        require_destination,
        tokenize_files,
    )
    from lwm.curation.tokenize_ray import encode_on_ray
    from lwm.data.text.tokenizer import read_tokenizer
    from lwm.generation.codec import load_vqgan

    if engine == "local" and workers is not None:
        raise ConfigError(f"--workers {workers} needs --engine ray; add it or omit --workers")
    settings = FrameSettings(max_frames=max_frames, fps=fps, batch_size=batch_size)
    require_destination(out, tokenizer)
    on_ray = encode_on_ray(vqgan, vqgan_config, settings, workers) if engine == "ray" else None
    words = None if tokenizer is None else read_tokenizer(tokenizer)
    captioned = captioned_files(paths, captions, uncaptioned)
    codec = load_vqgan(vqgan, config=vqgan_config)
    compute = on_ray or encode_locally(codec, settings)
    summary = tokenize_files(captioned.files, codec, out, settings, compute, words)
    faults = [*captioned.faults, *summary.faults]
    total = len(captioned.files) + len(captioned.faults) + len(captioned.uncaptioned)
    for fault in faults:
        say(fault)
    if faults:
        say(f"skipped {len(faults)} of {total} files that cannot be read, as reported above")
    for file in captioned.uncaptioned:
        say(f"{file} has no caption")
    if captioned.uncaptioned:
        say(
            f"skipped {len(captioned.uncaptioned)} of {total} files without a caption, as "
            "reported above; --uncaptioned keep keeps them"
        )
    say(
        f"({summary.examples:,} captioned images, {summary.frames:,} frames of "
        f"{codec.config.codes_per_frame} codes)"
    )
    print(out)
