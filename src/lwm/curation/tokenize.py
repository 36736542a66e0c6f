"""Folders of images and videos to training data: what `lwm tokenize` does.

Files are cut into groups by their names alone, and a group is what is computed, kept and, after an
interruption, computed again: the frames of its files go through the VQGAN together, those of one
group never with those of another, so the result depends neither on where a run was cut short nor
on who computes a group. What is done is kept beside the destination until that is written whole.

Knows files, frames and codes; where groups are computed is for its caller to say, here or on many
machines (`tokenize_ray`).
"""

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from lwm.core.errors import ConfigError, InputError
from lwm.core.files import refuse_existing
from lwm.core.progress import progress
from lwm.curation.captions import CaptionedFile
from lwm.data.examples.examples import Example
from lwm.data.examples.fields import FieldsEncoder
from lwm.data.images import VIDEOS
from lwm.data.sources.array_record import SUFFIX as ARRAY_RECORD
from lwm.data.sources.array_record import write_array_record
from lwm.data.text.tokenizer import Tokenizer
from lwm.data.text.vision_texts import training_line
from lwm.generation.codec import VqganCodec
from lwm.media.choice import check_choice
from lwm.media.images import read_image, to_unit
from lwm.media.videos import is_video, iterate_frames
from lwm.models.vision_tokens import VisionVocabulary

ENDINGS = (".jsonl", ".jsonl.gz", ARRAY_RECORD)
"""What is written, by the name of the destination."""

_READERS = min(4, os.cpu_count() or 1)  # a large image takes half a GB while it is reduced


@dataclass(frozen=True, kw_only=True)
class FrameSettings:
    """How files become frames, and frames codes.

    Args:
        max_frames: of a longer video, so many in even steps; all if None.
        fps: frames taken for a second of video; each one if None.
        batch_size: frames encoded at once, from one file or several.

    Raises:
        InputError: the frames are out of range.
        ConfigError: the batch is.
    """

    max_frames: int | None = None
    fps: float | None = 4.0
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_choice(self.max_frames, self.fps)
        if not 1 <= self.batch_size <= 4096:
            raise ConfigError(f"batch_size is {self.batch_size}; it must be 1 to 4096 frames")


class Outcome(NamedTuple):
    """What became of a file: codes of its frames, or the sentence that says why there are none."""

    codes: list[list[int]]
    fault: str | None = None


Group = tuple[CaptionedFile, ...]

EncodeGroups = Callable[[Sequence[Group]], Iterator[list[Outcome]]]
"""Computes groups and gives what became of their files, in order."""


class TokenizeSummary(NamedTuple):
    """What came of a whole run."""

    files: int
    frames: int
    examples: int
    faults: tuple[str, ...]


def groups_of(files: Sequence[CaptionedFile], settings: FrameSettings) -> list[Group]:
    """Cuts files into groups of about a batch of frames, as far as can be told without opening
    them; a video that may have any number of frames fills one."""
    groups: list[Group] = []
    group: list[CaptionedFile] = []
    frames = 0
    for file in files:
        group.append(file)
        frames += (settings.max_frames or settings.batch_size) if file.moving else 1
        if frames >= settings.batch_size:
            groups.append(tuple(group))
            group, frames = [], 0
    return [*groups, tuple(group)] if group else groups


def encode_group(
    codec: VqganCodec, paths: Sequence[Path], settings: FrameSettings
) -> list[Outcome]:
    """Codes of some files, their frames batched together. A file that cannot be read to its end
    costs itself alone."""
    codes: list[list[list[int]]] = [[] for _ in paths]
    faults: dict[int, str] = {}
    pending: list[tuple[int, np.ndarray]] = []

    def encode() -> None:
        if pending:
            pixels = to_unit(np.stack([frame for _, frame in pending]))
            found = codec.encode(pixels, batch=settings.batch_size).reshape(len(pending), -1)
            for (number, _), row in zip(pending, found.tolist(), strict=True):
                codes[number].append(row)
            pending.clear()

    size = codec.config.image_size
    with ThreadPoolExecutor(_READERS) as pool:
        stills = [pool.submit(_still, path, size) for path in paths]
        for number, path in enumerate(paths):
            try:
                still = stills[number].result()
                if still is not None:
                    frames: Iterable[np.ndarray] = [still]
                else:
                    frames = iterate_frames(
                        path, size, max_frames=settings.max_frames, fps=settings.fps
                    )
                for frame in frames:
                    pending.append((number, frame))
                    if len(pending) == settings.batch_size:
                        encode()
            except InputError as error:
                faults[number] = str(error)
    encode()
    return [
        Outcome([], faults[number]) if number in faults else Outcome(codes[number])
        for number in range(len(paths))
    ]


def _still(path: Path, size: int) -> UInt8[np.ndarray, "size size 3"] | None:
    """The picture of an image, or None where the file is a video, if perhaps a broken one."""
    if path.suffix.lower() in VIDEOS or is_video(path):
        return None
    return read_image(path, size)


def encode_locally(codec: VqganCodec, settings: FrameSettings) -> EncodeGroups:
    """An engine that computes one group after another in this process."""

    def encode(groups: Sequence[Group]) -> Iterator[list[Outcome]]:
        for group in groups:
            yield encode_group(codec, [file.path for file in group], settings)

    return encode


def require_destination(destination: Path, tokenizer: Path | None) -> None:
    """Refuses a destination that cannot be written, before any work.

    Raises:
        InputError: it exists, its directory does not, or its name is of no format.
        ConfigError: the format and the tokenizer do not go together.
    """
    refuse_existing(destination)
    if not destination.parent.is_dir():
        raise InputError(
            f"the directory {destination.parent} does not exist; make it or name another"
        )
    if not destination.name.endswith(ENDINGS):
        raise InputError(f"{destination} must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    tokens = destination.name.endswith(ARRAY_RECORD)
    if tokens and tokenizer is None:
        raise ConfigError(
            f"{destination} is to hold tokens, also of the captions; give the tokenizer of the "
            "model with --tokenizer, or write .jsonl"
        )
    if tokenizer is not None and not tokens:
        raise ConfigError(
            f"{destination} holds captions as text, which any tokenizer can read; leave "
            f"--tokenizer out, or write {ARRAY_RECORD}"
        )


def tokenize_files(
    files: Sequence[CaptionedFile],
    codec: VqganCodec,
    destination: Path,
    settings: FrameSettings,
    engine: EncodeGroups,
    tokenizer: Tokenizer | None = None,
) -> TokenizeSummary:
    """Writes training data of images and videos, in the order of the files.

    Interrupted and called again, it goes on behind the last finished group, and what it writes is
    what it would have written at once.

    Args:
        tokenizer: for a destination of tokens.

    Raises:
        InputError: what was kept is of another run, no file can be read, or the destination cannot
            be written.
    """
    groups = groups_of(files, settings)
    kept = Journal(journal_file(destination), _fingerprint(files, codec, settings))
    done = kept.open()
    with progress("tokenising", len(files)) as advance:
        advance(sum(len(group) for group in groups[:done]))
        for group, outcomes in zip(groups[done:], engine(groups[done:]), strict=True):
            assert len(outcomes) == len(group)
            kept.append(outcomes)
            advance(len(group))
    summary = _summary(files, kept)
    if len(summary.faults) == len(files):
        kept.remove()
        raise InputError(f"none of {len(files)} files can be read: {summary.faults[0]}")
    _write(destination, _lines(files, kept), codec, tokenizer)
    kept.remove()
    return summary


def journal_file(destination: Path) -> Path:
    """Where a run keeps what it has done."""
    return destination.with_name(f"{destination.name}.partial")


class Journal:
    """What became of the files so far: a line for the run, then one for each group.

    A line is on the disk before the next group begins; one that a killed process left half written
    is forgotten.
    """

    def __init__(self, file: Path, fingerprint: str) -> None:
        self._file, self._fingerprint = file, fingerprint

    def open(self) -> int:
        """Begins or goes on; how many groups are done.

        Raises:
            InputError: the file was made by another run, or cannot be written.
        """
        try:
            with self._file.open("ab+") as file:
                file.seek(0)
                end = lines = 0
                for number, line in enumerate(file):
                    if not line.endswith(b"\n"):
                        break
                    if number == 0 and line != self._head():
                        raise InputError(
                            f"{self._file} was begun with other files, settings or another VQGAN; "
                            "go on with those, or remove it to start anew"
                        )
                    end, lines = end + len(line), number + 1
                file.truncate(end)
                if not lines:
                    file.write(self._head())
        except OSError as error:
            raise InputError(
                f"{self._file} cannot be written ({error.strerror}); name another place with --out"
            ) from error
        return max(0, lines - 1)

    def append(self, outcomes: Sequence[Outcome]) -> None:
        with self._file.open("ab") as file:
            file.write(json.dumps(outcomes, separators=(",", ":")).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def outcomes(self) -> Iterator[Outcome]:
        """What became of each file, in order; read anew each time, as it may exceed memory."""
        with self._file.open("rb") as file:
            next(file)
            for line in file:
                for codes, fault in json.loads(line):
                    yield Outcome(codes, fault)

    def remove(self) -> None:
        self._file.unlink(missing_ok=True)

    def _head(self) -> bytes:
        return json.dumps({"run": self._fingerprint}).encode() + b"\n"


def _fingerprint(
    files: Sequence[CaptionedFile], codec: VqganCodec, settings: FrameSettings
) -> str:
    """Tells runs apart whose codes may differ: captions do not matter, contents of files do."""
    found = hashlib.sha256(repr((codec.fingerprint, settings)).encode())
    for file in files:
        about = file.path.stat()
        found.update(repr((file.source, about.st_size, about.st_mtime_ns)).encode())
    return found.hexdigest()[:16]


def _summary(files: Sequence[CaptionedFile], kept: Journal) -> TokenizeSummary:
    frames = examples = 0
    faults = []
    for file, outcome in zip(files, kept.outcomes(), strict=True):
        if outcome.fault is not None:
            faults.append(outcome.fault)
            continue
        frames += len(outcome.codes)
        examples += max(1, len(file.captions))
    return TokenizeSummary(
        files=len(files), frames=frames, examples=examples, faults=tuple(faults)
    )


def _lines(files: Sequence[CaptionedFile], kept: Journal) -> Iterator[dict[str, Any]]:
    for file, outcome in zip(files, kept.outcomes(), strict=True):
        if outcome.fault is None:
            codes = np.array(outcome.codes, np.int32)
            for caption in file.captions or ("",):
                yield training_line(codes, caption, file.source)


def _write(
    destination: Path,
    lines: Iterator[dict[str, Any]],
    codec: VqganCodec,
    tokenizer: Tokenizer | None,
) -> None:
    if tokenizer is not None:
        write_array_record(destination, _examples(lines, codec, tokenizer))
        return
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        with partial.open("wb") as file:
            if destination.suffix == ".gz":
                # Without name and time, so that the same data gives the same bytes.
                with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
                    packed.writelines(map(_json_line, lines))
            else:
                file.writelines(map(_json_line, lines))
        partial.replace(destination)
    except OSError as error:
        raise InputError(
            f"{destination} cannot be written ({error.strerror}); free the disk and call again"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _json_line(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _examples(
    lines: Iterator[dict[str, Any]], codec: VqganCodec, tokenizer: Tokenizer
) -> Iterator[Example]:
    """An example for each way in which a line can be read."""
    config = codec.config
    vision = VisionVocabulary(
        size=config.codebook_size + 2,
        codes=config.codebook_size,
        codes_per_frame=config.codes_per_frame,
    )
    ways: dict[int, FieldsEncoder] = {}
    for number, line in enumerate(lines):
        for way in range(len(line["fields"])):
            encoder = ways.setdefault(
                way,
                FieldsEncoder(
                    tokenizer=tokenizer,
                    fields_from_example="fields",
                    fields_index=way,
                    vision=vision,
                ),
            )
            example = encoder(line, number)
            assert example is not None  # it has codes
            yield example
