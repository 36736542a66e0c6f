"""Find images and videos in folders, and the captions that belong to them.

A caption is in a text file beside the image (`cat.jpg`, `cat.txt`) or in a manifest: CSV with the
header `file,caption`, or JSON lines with these keys, where several lines may name one file. Files
are named by their paths relative to the folder, so names are valid on any machine.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lwm.core.errors import InputError
from lwm.data.images import IMAGES, is_media, is_visible

_MAX_CAPTION_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CaptionedFile:
    """Hold an image or a video; without captions it is learned without a prompt."""

    path: Path
    source: str  # path relative to the folder, or the name of a single file
    captions: tuple[str, ...] = ()

    @property
    def moving(self) -> bool:
        """Return whether the file is a video by its name."""
        return self.path.suffix.lower() not in IMAGES


@dataclass(frozen=True, kw_only=True)
class CaptionedFiles:
    """Hold the files to use, the names of those without a caption, and unreadable captions."""

    files: tuple[CaptionedFile, ...]
    uncaptioned: tuple[str, ...]
    faults: tuple[str, ...]


def captioned_files(
    paths: Sequence[Path],
    manifest: Path | None = None,
    uncaptioned: Literal["skip", "keep"] = "skip",
) -> CaptionedFiles:
    """Find images and videos in files and folders, with their captions.

    A file of another kind is in the result if it has a caption, so that it is reported.

    Args:
        manifest: captions; a file that it does not name may still have a text file beside it.
    """
    media, others = find_files(paths)
    by_file = {} if manifest is None else _read_manifest(manifest, [*media, *others])
    # The text beside cat.jpg is not the caption of cat.json.
    stems = {file.path.with_suffix("") for file in media}
    files = media + [
        file
        for file in others
        if file.path in by_file
        or (file.path.with_suffix("") not in stems and file.path.with_suffix(".txt").is_file())
    ]
    if not files:
        raise InputError(f"{paths[0]} holds no images or videos; name a folder that does")
    result: list[CaptionedFile] = []
    skipped: list[str] = []
    faults: list[str] = []
    for file in files:
        try:
            captions = tuple(by_file.get(file.path, ())) or _caption_beside(file.path)
        except InputError as error:
            faults.append(str(error))
            continue
        if captions or uncaptioned == "keep":
            result.append(replace(file, captions=captions))
        else:
            skipped.append(file.source)
    if not result and faults:
        raise InputError(f"none of {len(files)} files has a caption that can be read: {faults[0]}")
    if not result:
        raise InputError(
            f"none of {len(files)} files has a caption, {skipped[0]} for one; put a .txt beside "
            "each, give a manifest with --captions, or keep them with --uncaptioned keep"
        )
    return CaptionedFiles(files=tuple(result), uncaptioned=tuple(skipped), faults=tuple(faults))


def find_files(paths: Sequence[Path]) -> tuple[list[CaptionedFile], list[CaptionedFile]]:
    """Return the images and videos of files and folders, and the other files, each once.

    A file that is named itself counts as an image or a video.
    """
    if not paths:
        raise InputError("there is nothing to look at; name a folder of images and videos")
    media: list[CaptionedFile] = []
    others: list[CaptionedFile] = []
    visited: set[Path] = set()
    for path in paths:
        if path.is_dir():
            inside = [file for file in path.rglob("*") if is_visible(file, path)]
            named = sorted((file.relative_to(path).as_posix(), file) for file in inside)
        elif path.is_file():
            named = [(path.name, path)]
        else:
            raise InputError(f"{path} does not exist; name a folder, an image or a video")
        for source, file in named:
            if (resolved := file.resolve()) not in visited:
                visited.add(resolved)
                group = media if file == path or is_media(file) else others
                group.append(CaptionedFile(path=file, source=source))
    return media, others


def _caption_beside(image: Path) -> tuple[str, ...]:
    file = image.with_suffix(".txt")
    if not file.is_file():
        return ()
    try:
        if file.stat().st_size > _MAX_CAPTION_BYTES:
            raise InputError(
                f"the caption {file} is over {_MAX_CAPTION_BYTES >> 20} MB; shorten it"
            )
        caption = file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"the caption {file} is not UTF-8; save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"the caption {file} cannot be read ({error.strerror})") from error
    return (caption,) if caption else ()


def _read_manifest(manifest: Path, files: Sequence[CaptionedFile]) -> dict[Path, list[str]]:
    """Read captions by the path of the file, without empty ones.

    A name in the manifest is the source of a file, or a path relative to the manifest.
    """
    by_source: dict[str, list[Path]] = {}
    for file in files:
        by_source.setdefault(file.source, []).append(file.path)
    by_path = {file.path.resolve(): file.path for file in files}
    captions: dict[Path, list[str]] = {}
    missing: list[tuple[int, str]] = []
    for line, name, caption in _entries(manifest):
        matches = by_source.get(Path(name).as_posix(), [])
        if len(matches) > 1:
            raise InputError(
                f"{manifest}, line {line}: {name!r} may be {matches[0]} or {matches[1]}; write "
                "the path in full"
            )
        path = matches[0] if matches else by_path.get((manifest.parent / name).resolve())
        if path is None:
            missing.append((line, name))
        elif caption.strip():
            captions.setdefault(path, []).append(caption.strip())
    if missing:
        (line, name), *others = missing
        lines = ", ".join(str(line) for line, _ in others[:5]) + ", ..." * (len(others) > 5)
        more = f" (nor are the files of line {lines})" if others else ""
        raise InputError(
            f"{manifest}, line {line}: {name!r} is not among the images and videos that are "
            f"given{more}; correct the name or remove the line"
        )
    return captions


def _entries(manifest: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the line, the file and the caption of each entry."""
    read = {".csv": _csv_entries, ".jsonl": _json_entries}.get(manifest.suffix.lower())
    if read is None:
        raise InputError(f"the captions {manifest} must be a .csv or a .jsonl file")
    try:
        for line, name, caption in read(manifest):
            if not isinstance(name, str) or not name or not isinstance(caption, str):
                raise InputError(
                    f"{manifest}, line {line}: a file and a caption are needed as text"
                )
            if any("\ud800" <= character <= "\udfff" for character in name + caption):
                raise InputError(
                    f"{manifest}, line {line}: half of a surrogate pair; write both halves"
                )
            if "\0" in name:
                raise InputError(f"{manifest}, line {line}: no file has the name {name!r}")
            yield line, name, caption
    except OSError as error:
        raise InputError(f"the captions {manifest} cannot be read ({error.strerror})") from error
    except UnicodeError as error:
        raise InputError(f"the captions {manifest} are not UTF-8; save them as UTF-8") from error


def _csv_entries(manifest: Path) -> Iterator[tuple[int, object, object]]:
    with manifest.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            header = ",".join(reader.fieldnames or ())
            if not {"file", "caption"} <= set(reader.fieldnames or ()):
                raise InputError(
                    f"{manifest}, line 1: the header is {header!r}; it needs file and caption"
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
