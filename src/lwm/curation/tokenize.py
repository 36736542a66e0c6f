"""Encode folders of images and videos as training data for `lwm tokenize`.

Files are divided into groups by their names. A group is encoded, stored and resumed as a unit: the
frames of its files share batches, and frames of different groups never do, so the result depends
neither on where a run was interrupted nor on which machine encodes a group. A journal beside the
destination stores finished groups until the destination is complete.
"""

import gzip
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from annotated_types import Ge, Le, Lt
from jaxtyping import UInt8

from lwm.core.config import Checked
from lwm.core.errors import ConfigError, InputError
from lwm.core.files import new_file, refuse_existing, require_utf8
from lwm.core.journal import append, discard_incomplete, json_line, read_journal
from lwm.core.progress import progress
from lwm.curation.captions import CaptionedFile
from lwm.data.examples.examples import Example
from lwm.data.examples.fields import FieldsEncoder
from lwm.data.images import is_moving
from lwm.data.sources.array_record import SUFFIX as ARRAY_RECORD
from lwm.data.sources.array_record import write_array_record
from lwm.data.text.tokenizer import Tokenizer
from lwm.data.text.vision_texts import training_line
from lwm.generation.codec import VqganCodec
from lwm.media.choice import check_choice
from lwm.media.images import read_image, to_unit
from lwm.media.videos import iterate_frames
from lwm.models.vision_tokens import VisionVocabulary

_EXTENSIONS = (".jsonl", ".jsonl.gz", ARRAY_RECORD)

_READERS = min(4, os.cpu_count() or 1)  # a large image takes half a GB while it is reduced


@dataclass(frozen=True, kw_only=True)
class FrameSettings(Checked):
    """Configure the frames of a file, as for `read_video`, and the batches to encode them in."""

    max_frames: int | None = None
    fps: float | None = 4.0
    batch_size: Annotated[int, Ge(1), Le(4096)] = 16  # frames, from one file or several

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.max_frames, self.fps)


class Outcome(NamedTuple):
    """Hold the codes of the frames of a file, or the error that prevented them."""

    codes: list[list[Annotated[int, Ge(0), Lt(1 << 31)]]]
    fault: str | None = None


Group = tuple[CaptionedFile, ...]

EncodeGroups = Callable[[Sequence[Group]], Iterator[list[Outcome]]]
"""Encode groups; yields the outcomes of the files of each group, in order."""


class TokenizeSummary(NamedTuple):
    """Count the frames and examples of a run, and list the errors."""

    frames: int
    examples: int
    faults: tuple[str, ...]


def groups_of(files: Sequence[CaptionedFile], settings: FrameSettings) -> list[Group]:
    """Divide files into groups of about a batch of frames, without opening them."""
    groups: list[Group] = []
    group: list[CaptionedFile] = []
    frames = 0
    for file in files:
        group.append(file)
        # A video may have any number of frames.
        frames += (settings.max_frames or settings.batch_size) if file.moving else 1
        if frames >= settings.batch_size:
            groups.append(tuple(group))
            group, frames = [], 0
    return [*groups, tuple(group)] if group else groups


def encode_group(
    codec: VqganCodec, paths: Sequence[Path], settings: FrameSettings
) -> list[Outcome]:
    """Encode the frames of files in shared batches; a broken file does not affect the others."""
    codes: list[list[list[int]]] = [[] for _ in paths]
    faults: dict[int, str] = {}
    pending: list[tuple[int, np.ndarray]] = []

    def encode() -> None:
        if pending:
            pixels = to_unit(np.stack([frame for _, frame in pending]))
            batch = codec.encode(pixels, batch=settings.batch_size).reshape(len(pending), -1)
            for (number, _), row in zip(pending, batch.tolist(), strict=True):
                codes[number].append(row)
            pending.clear()

    size = codec.config.image_size
    sample = partial(iterate_frames, size=size, max_frames=settings.max_frames, fps=settings.fps)
    with ThreadPoolExecutor(_READERS) as pool:
        images = [pool.submit(_image, path, size) for path in paths]
        for number, path in enumerate(paths):
            try:
                image = images[number].result()
                for frame in sample(path) if image is None else [image]:
                    pending.append((number, frame))
                    if len(pending) == settings.batch_size:
                        encode()
            except InputError as error:
                faults[number] = str(error)
    encode()
    return [
        Outcome([] if number in faults else rows, faults.get(number))
        for number, rows in enumerate(codes)
    ]


def _image(path: Path, size: int) -> UInt8[np.ndarray, "size size 3"] | None:
    """Read an image; None if the file is a video, even a broken one."""
    return None if is_moving(path) else read_image(path, size)


def encode_locally(codec: VqganCodec, settings: FrameSettings) -> EncodeGroups:
    """Return a function that encodes one group after another in this process."""

    def encode(groups: Sequence[Group]) -> Iterator[list[Outcome]]:
        for group in groups:
            yield encode_group(codec, [file.path for file in group], settings)

    return encode


def require_destination(destination: Path, tokenizer: Path | None) -> None:
    """Raise InputError or ConfigError for a destination that cannot be written."""
    refuse_existing(destination)
    if not destination.parent.is_dir():
        raise InputError(
            f"the directory {destination.parent} does not exist; create it or name another"
        )
    if not destination.name.endswith(_EXTENSIONS):
        raise InputError(f"{destination} must end in .jsonl, .jsonl.gz or {ARRAY_RECORD}")
    tokens = destination.name.endswith(ARRAY_RECORD)
    if tokens:
        require_utf8(destination, "ArrayRecord files must be")
    if tokens and tokenizer is None:
        raise ConfigError(
            f"{destination} stores tokens; give the tokenizer with --tokenizer, or write .jsonl"
        )
    if tokenizer is not None and not tokens:
        raise ConfigError(
            f"{destination} stores text; leave --tokenizer out, or write {ARRAY_RECORD}"
        )


def tokenize_files(
    files: Sequence[CaptionedFile],
    codec: VqganCodec,
    destination: Path,
    settings: FrameSettings,
    encode: EncodeGroups,
    tokenizer: Tokenizer | None = None,
) -> TokenizeSummary:
    """Write training data of images and videos, in the order of the files.

    An interrupted call resumes after the last finished group and writes the same file. A tokenizer
    is needed for a destination of tokens.
    """
    groups = groups_of(files, settings)
    journal = journal_file(destination)
    done = _resume(journal, _fingerprint(files, codec, settings))
    with progress("tokenizing", len(files)) as advance:
        advance(sum(len(group) for group in groups[:done]))
        for group, outcomes in zip(groups[done:], encode(groups[done:]), strict=True):
            assert len(outcomes) == len(group)
            append(journal, outcomes)
            advance(len(group))
    frames = examples = 0
    faults: list[str] = []
    for file, outcome in _outcomes(files, journal):
        if outcome.fault is not None:
            faults.append(outcome.fault)
            continue
        frames += len(outcome.codes)
        examples += max(1, len(file.captions))
    if len(faults) == len(files):
        journal.unlink()
        raise InputError(f"none of {len(files)} files can be read: {faults[0]}")
    _write(destination, _lines(files, journal), codec, tokenizer)
    journal.unlink()
    return TokenizeSummary(frames, examples, tuple(faults))


def journal_file(destination: Path) -> Path:
    """Return the path of the journal: a line for the run, then one for each finished group."""
    return destination.with_name(f"{destination.name}.partial")


def _resume(journal: Path, fingerprint: str) -> int:
    """Start or continue a journal; return how many groups it has."""
    head = {"run": fingerprint}
    lines = 0
    try:
        discard_incomplete(journal)
        for lines, value in read_journal(journal):
            if lines == 1 and value != head:
                raise InputError(
                    f"{journal} was begun with other files, settings or another VQGAN; continue "
                    "with those, or remove it to start again"
                )
        if not lines:
            append(journal, head)
    except OSError as error:
        raise InputError(
            f"{journal} cannot be written ({error.strerror}); name another place with --out"
        ) from error
    return max(0, lines - 1)


def _is_whole(outcome: Outcome) -> bool:
    sizes = {len(codes) for codes in outcome.codes}
    return len(sizes) == 1 if outcome.fault is None else not sizes


def _outcomes(
    files: Sequence[CaptionedFile], journal: Path
) -> Iterator[tuple[CaptionedFile, Outcome]]:
    """Read the outcome of each file; all of them may exceed memory."""
    lines = read_journal(journal, dict[str, str] | list[Outcome])
    outcomes = (one for _, line in lines if isinstance(line, list) for one in line)
    for file, outcome in zip_longest(files, outcomes):
        if file is None or outcome is None or not _is_whole(outcome):
            raise InputError(f"{journal} is of other files, or broken; remove it to start again")
        yield file, outcome


def _fingerprint(
    files: Sequence[CaptionedFile], codec: VqganCodec, settings: FrameSettings
) -> str:
    """Identify everything that codes depend on; captions are not part of it."""
    digest = hashlib.sha256(repr((codec.fingerprint, settings)).encode())
    for file in files:
        status = file.path.stat()
        digest.update(repr((file.source, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()[:16]


def _lines(files: Sequence[CaptionedFile], journal: Path) -> Iterator[dict[str, Any]]:
    for file, outcome in _outcomes(files, journal):
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
    with new_file(destination, replace=True) as path, path.open("wb") as file:
        if destination.suffix == ".gz":
            # Without name and time, so that equal data gives equal bytes.
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
                packed.writelines(json_line(line, (",", ":")) for line in lines)
        else:
            file.writelines(json_line(line, (",", ":")) for line in lines)


def _examples(
    lines: Iterator[dict[str, Any]], codec: VqganCodec, tokenizer: Tokenizer
) -> Iterator[Example]:
    """Encode each line once for each list of fields that it can be read with."""
    codes, frame = codec.config.codebook_size, codec.config.codes_per_frame
    vision = VisionVocabulary(size=codes + 2, codes=codes, codes_per_frame=frame)

    @cache
    def encoder(index: int) -> FieldsEncoder:
        return FieldsEncoder(
            tokenizer=tokenizer, fields_from_example="fields", fields_index=index, vision=vision
        )

    for number, line in enumerate(lines):
        for index in range(len(line["fields"])):
            example = encoder(index)(line, number)
            assert example is not None  # it has codes
            yield example
