"""Check which files are found, how they are named, and which captions they get."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lwm.core.errors import InputError
from lwm.curation.captions import CaptionedFile, captioned_files, find_files


def write_png(file: Path, caption: str | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as opened:
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(opened, format="PNG")
    if caption is not None:
        file.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make images, not in the order of their names."""
    folder = tmp_path / "pictures"
    write_png(folder / "b.png", "a bear\n")
    write_png(folder / "a" / "cat.png", "\ufeffa cat")
    write_png(folder / "z")  # recognized by its content
    (folder / "broken.mp4").write_bytes(b"nothing")
    (folder / "notes.md").write_text("no picture", encoding="utf-8")
    (folder / "empty").write_bytes(b"")
    write_png(folder / ".hidden" / "c.png", "unseen")
    return folder


def captions(files: tuple[CaptionedFile, ...]) -> dict[str, tuple[str, ...]]:
    return {file.source: file.captions for file in files}


def test_folders_are_listed_by_name(folder: Path) -> None:
    sources = [file.source for file in find_files([folder])[0]]
    assert sources == ["a/cat.png", "b.png", "broken.mp4", "z"]


def test_a_file_named_twice_is_listed_once(folder: Path) -> None:
    sources = [file.source for file in find_files([folder / "a" / "cat.png", folder])[0]]
    assert sources == ["cat.png", "b.png", "broken.mp4", "z"]


def test_captions_are_read_beside_their_files(folder: Path) -> None:
    result = captioned_files([folder])
    assert captions(result.files) == {"a/cat.png": ("a cat",), "b.png": ("a bear",)}
    assert result.uncaptioned == ("broken.mp4", "z")
    all_files = captioned_files([folder], uncaptioned="keep")
    assert captions(all_files.files) == captions(result.files) | {"broken.mp4": (), "z": ()}
    assert all_files.uncaptioned == ()


def test_files_that_are_no_media_are_in_the_result_if_they_have_a_caption(folder: Path) -> None:
    for name in ("drawing.svg", "paper.pdf", "b.json", "table.dat", "photo.HEIC"):
        (folder / name).write_bytes(b"anything")
    (folder / "paper.txt").write_text("a paper", encoding="utf-8")
    (folder.parent / "some.csv").write_text("file,caption\ntable.dat,a table\n")
    result = captioned_files([folder], folder.parent / "some.csv")
    assert captions(result.files) == {
        "a/cat.png": ("a cat",),
        "b.png": ("a bear",),  # b.txt is not the caption of b.json
        "paper.pdf": ("a paper",),
        "table.dat": ("a table",),
    }
    # Their names say that they are images.
    assert result.uncaptioned == ("broken.mp4", "drawing.svg", "photo.HEIC", "z")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.csv", 'file,caption,by\nz,"one, two",me\nz,again,me\na/cat.png,,me\n'),
        (
            "captions.jsonl",
            '{"file": "z", "caption": "one, two"}\n\n{"file": "z", "caption": " again "}\n',
        ),
        ("captions.csv", '\ufefffile,caption\npictures/z,"one, two"\nPLACE/z,again\n'),
    ],
)
def test_manifests_may_name_a_file_several_times(folder: Path, name: str, text: str) -> None:
    manifest = folder.parent / name
    manifest.write_text(text.replace("PLACE", str(folder)), encoding="utf-8")
    result = captioned_files([folder], manifest)
    assert captions(result.files) == {
        "a/cat.png": ("a cat",),
        "b.png": ("a bear",),
        "z": ("one, two", "again"),
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "file,caption\nz,x\nq.png,x\nz,y\nr.png,x\n", r"line 3: 'q.png'.*line 5\)"),
        ("a.jsonl", '{"file": "q", "caption": "x"}', "line 1: 'q' is not among .* given; correct"),
        ("a.csv", "name,caption\nz,x\n", "header is 'name,caption'"),
        ("a.csv", "", "header is ''"),
        ("a.csv", "file,caption\nz\n", "line 2: a file and a caption are needed"),
        ("a.csv", 'file,caption\nz,"' + "x" * 200_000, "line 2: field larger"),
        ("a.jsonl", '{"file": "z"}', "line 1: a file and a caption are needed"),
        ("a.jsonl", '\n{"file": ', "line 2: it is not JSON"),
        ("a.jsonl", "[]", "line 1: a JSON object"),
        ("a.jsonl", '{"file": "z", "caption": "\\ud800"}', "line 1: half of a surrogate"),
        ("a.txt", "", "must be a .csv or a .jsonl"),
    ],
)
def test_wrong_manifests_are_refused(folder: Path, name: str, text: str, message: str) -> None:
    manifest = folder.parent / name
    manifest.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        captioned_files([folder], manifest)


def test_unreadable_manifests_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"a.csv cannot be read \(No such file"):
        captioned_files([folder], folder / "a.csv")
    (folder / "a.csv").write_bytes(b"file,caption\nz,\xff\n")
    with pytest.raises(InputError, match="not UTF-8"):
        captioned_files([folder], folder / "a.csv")


def test_a_name_that_matches_two_files_is_refused(folder: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "more" / "z")
    manifest = tmp_path / "a.csv"
    manifest.write_text("file,caption\nz,x\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"line 2: 'z' may be .*pictures/z or .*more/z"):
        captioned_files([folder, tmp_path / "more"], manifest)


def test_an_unreadable_caption_skips_its_file(folder: Path) -> None:
    (folder / "b.txt").write_bytes(b"\xff")
    result = captioned_files([folder])
    assert captions(result.files) == {"a/cat.png": ("a cat",)}
    assert len(result.faults) == 1
    assert "b.txt is not UTF-8" in result.faults[0]
    with pytest.raises(InputError, match=r"caption that can be read: .*b.txt is not UTF-8"):
        captioned_files([folder / "b.png"])


def test_paths_without_images_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="nothing to look at"):
        captioned_files([])
    with pytest.raises(InputError, match="gone does not exist"):
        captioned_files([folder / "gone"])
    (folder / "none").mkdir()
    with pytest.raises(InputError, match="none holds no images or videos"):
        captioned_files([folder / "none"])
    with pytest.raises(InputError, match="none of 1 files has a caption, z for one"):
        captioned_files([folder / "z"])
