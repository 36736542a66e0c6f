"""Images and videos in folders, and the captions that belong to them.

A caption lies in a text file beside the picture (`cat.jpg`, `cat.txt`) or in a manifest: CSV with
the header `file,caption`, or JSON lines with these keys; several lines may name one file. What a
file is called is its path below the folder that was named, so names hold on any machine. Knows
names and texts; what a picture shows, or whether it can be read at all, is for others to find out.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lwm.core.errors import InputError
from lwm.data.images import IMAGES, is_media

MAX_CAPTION_BYTES = 1 << 20

Uncaptioned = Literal["skip", "keep"]


@dataclass(frozen=True, kw_only=True)
class CaptionedFile:
    """An image or a video.

    Args:
        source: what it is called: the path below the folder that was named, or the file's name.
        captions: one or several; none where it teaches the picture alone.
    """

    path: Path
    source: str
    captions: tuple[str, ...] = ()

    @property
    def moving(self) -> bool:
        """Whether it has many frames, as far as its name tells."""
        return self.path.suffix.lower() not in IMAGES


@dataclass(frozen=True, kw_only=True)
class Found:
    """What folders hold.

    Args:
        files: in the order in which they were named, each folder's by name.
        uncaptioned: names of files that were left out for want of a caption.
        faults: a sentence for each file whose caption cannot be read.
    """

    files: tuple[CaptionedFile, ...]
    uncaptioned: tuple[str, ...]
    faults: tuple[str, ...]


def captioned_files(
    paths: Sequence[Path], manifest: Path | None = None, uncaptioned: Uncaptioned = "skip"
) -> Found:
    """The images and videos of files and folders, with their captions.

    Args:
        manifest: captions; a file that it does not name may still have a text file beside it.
        uncaptioned: leave files without a caption out, or keep them.

    Raises:
        InputError: a path is missing or holds no pictures, the manifest is broken or names a file
            that is not there, or nothing is left.
    """
    files = list(find_pictures(paths))
    told = {} if manifest is None else read_manifest(manifest, files)
    kept: list[CaptionedFile] = []
    bare: list[str] = []
    faults: list[str] = []
    for file in files:
        captions = tuple(told.get(file.path, ()))
        if not captions:
            try:
                captions = _caption_beside(file.path)
            except InputError as error:
                faults.append(str(error))
                continue
        if not captions and uncaptioned == "skip":
            bare.append(file.source)
            continue
        kept.append(CaptionedFile(path=file.path, source=file.source, captions=captions))
    if not kept:
        if faults:
            raise InputError(
                f"none of {len(files)} files has a caption that can be read: {faults[0]}"
            )
        raise InputError(
            f"none of {len(files)} files has a caption, {bare[0]} for one; put a .txt beside "
            "each, give a manifest with --captions, or keep them with --uncaptioned keep"
        )
    return Found(files=tuple(kept), uncaptioned=tuple(bare), faults=tuple(faults))


def find_pictures(paths: Sequence[Path]) -> Iterator[CaptionedFile]:
    """Images and videos, each once, without captions.

    Raises:
        InputError: there is no path, one is missing, or a folder holds none.
    """
    if not paths:
        raise InputError("there is nothing to look at; name a folder of images and videos")
    seen: set[Path] = set()
    for path in paths:
        if path.is_dir():
            inside = [file for file in path.rglob("*") if is_media(file, path)]
            if not inside:
                raise InputError(f"{path} holds no images or videos; name a folder that does")
            named = sorted((file.relative_to(path).as_posix(), file) for file in inside)
        elif path.is_file():
            named = [(path.name, path)]
        else:
            raise InputError(f"{path} does not exist; name a folder, an image or a video")
        for source, file in named:
            if (place := file.resolve()) not in seen:
                seen.add(place)
                yield CaptionedFile(path=file, source=source)


def _caption_beside(picture: Path) -> tuple[str, ...]:
    file = picture.with_suffix(".txt")
    if not file.is_file():
        return ()
    try:
        if file.stat().st_size > MAX_CAPTION_BYTES:
            raise InputError(f"{file} is longer than {MAX_CAPTION_BYTES >> 20} MB, no caption is")
        caption = file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"the caption {file} is not UTF-8; save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"the caption {file} cannot be read ({error.strerror})") from error
    return (caption,) if caption else ()


def read_manifest(manifest: Path, files: Sequence[CaptionedFile]) -> dict[Path, list[str]]:
    """Captions by the path of the file. A name in the manifest is what the file is called, or a
    path from where the manifest lies. Empty captions count for nothing.

    Raises:
        InputError: the manifest cannot be read, or names what is not among the files; says in
            which lines.
    """
    by_source: dict[str, list[Path]] = {}
    for file in files:
        by_source.setdefault(file.source, []).append(file.path)
    by_place = {file.path.resolve(): file.path for file in files}
    captions: dict[Path, list[str]] = {}
    missing: list[tuple[int, str]] = []
    for line, name, caption in _entries(manifest):
        known = by_source.get(Path(name).as_posix(), [])
        if len(known) > 1:
            raise InputError(
                f"{manifest}, line {line}: {name!r} may be {known[0]} or {known[1]}; write the "
                "path in full"
            )
        path = known[0] if known else by_place.get((manifest.parent / name).resolve())
        if path is None:
            missing.append((line, name))
        elif caption.strip():
            captions.setdefault(path, []).append(caption.strip())
    if missing:
        line, name = missing[0]
        further = ", ".join(str(line) for line, _ in missing[1:6])
        more = (
            f" (nor are those of line {further}{', ...' * (len(missing) > 6)})" if further else ""
        )
        raise InputError(
            f"{manifest}, line {line}: {name!r} is not among the images and videos that are "
            f"given{more}; correct the name or take the line out"
        )
    return captions


def _entries(manifest: Path) -> Iterator[tuple[int, str, str]]:
    """Line, file and caption of each entry."""
    readers = {".csv": _csv_entries, ".jsonl": _json_entries}
    read = readers.get(manifest.suffix.lower())
    if read is None:
        raise InputError(f"the captions {manifest} must be a .csv or a .jsonl file")
    try:
        for line, name, caption in read(manifest):
            if not isinstance(name, str) or not name or not isinstance(caption, str):
                raise InputError(
                    f"{manifest}, line {line}: a file and a caption are needed, both of them text"
                )
            if any("\ud800" <= character <= "\udfff" for character in name + caption):
                raise InputError(
                    f"{manifest}, line {line}: half of a surrogate pair, which JSON allows, is no "
                    "character; write the whole"
                )
            yield line, name, caption
    except OSError as error:
        raise InputError(
            f"the captions {manifest} cannot be read ({error.strerror}); check the path"
        ) from error
    except UnicodeError as error:
        raise InputError(f"the captions {manifest} are not UTF-8; save them as UTF-8") from error


def _csv_entries(manifest: Path) -> Iterator[tuple[int, object, object]]:
    with manifest.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            if not {"file", "caption"} <= set(reader.fieldnames or ()):
                raise InputError(
                    f"{manifest}, line 1: the header is {','.join(reader.fieldnames or ())!r}; it "
                    "must have the columns file and caption"
                )
            for row in reader:
                yield reader.line_num, row["file"], row["caption"]
        except csv.Error as error:
            raise InputError(f"{manifest}, line {reader.line_num + 1}: {error}") from error


def _json_entries(manifest: Path) -> Iterator[tuple[int, object, object]]:
    with manifest.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{manifest}, line {line}: it is not JSON ({error})") from error
            if not isinstance(value, dict):
                raise InputError(f"{manifest}, line {line}: a JSON object is needed")
            yield line, value.get("file"), value.get("caption")
