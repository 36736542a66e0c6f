"""`lwm tokenize`: folders of images and videos with captions to training data."""

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
    """Turn folders of images and videos with captions into training data.

    A caption is the text file beside a picture (cat.jpg, cat.txt), or comes from --captions. Files
    that cannot be read are told and left out. Interrupted and called again, it goes on where it
    was: what is done is kept in OUT.partial until OUT is whole.

    Args:
        vqgan: The VQGAN that makes codes: our directory, a training run, or the original's pickle.
        out: File to write for 'lwm train ... --data.path': .jsonl, .jsonl.gz, or .array_record,
            which holds tokens.
        vqgan_config: For the original's pickle: a JSON file of its settings.
        captions: A CSV file with the header file,caption or a JSONL file with these keys; names
            are paths below PATH, or from where this file lies.
        uncaptioned: What has no caption is left out (skip), or teaches pictures without a prompt
            (keep).
        max_frames: Most frames of a video, evenly spread; all unless given.
        fps: Frames taken for a second of video; None takes each.
        batch_size: Frames encoded at once, from one file or several.
        tokenizer: For .array_record: the tokenizer of the model that is to learn.
        engine: Where codes are computed: local is this process, ray the machines of a Ray cluster.
        workers: With --engine ray: processes; one for each GPU, or else each machine, unless
            given.
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
        raise ConfigError(f"--workers {workers} goes with --engine ray; add that or leave it out")
    settings = FrameSettings(max_frames=max_frames, fps=fps, batch_size=batch_size)
    require_destination(out, tokenizer)
    on_ray = encode_on_ray(vqgan, vqgan_config, settings, workers) if engine == "ray" else None
    words = None if tokenizer is None else read_tokenizer(tokenizer)
    found = captioned_files(paths, captions, uncaptioned)
    codec = load_vqgan(vqgan, config=vqgan_config)
    compute = on_ray or encode_locally(codec, settings)
    summary = tokenize_files(found.files, codec, out, settings, compute, words)
    faults = [*found.faults, *summary.faults]
    total = len(found.files) + len(found.faults) + len(found.uncaptioned)
    for fault in faults:
        say(fault)
    if faults:
        say(f"{len(faults)} of {total} files cannot be read and were left out, as told above")
    if found.uncaptioned:
        say(
            f"{len(found.uncaptioned)} of {total} files have no caption and were left out, "
            f"{found.uncaptioned[0]} for one; --uncaptioned keep keeps such files"
        )
    say(
        f"({summary.examples:,} captioned pictures, {summary.frames:,} frames of "
        f"{codec.config.codes_per_frame} codes)"
    )
    print(out)
