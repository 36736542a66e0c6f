"""Which files are found, what they are called, and which captions are theirs."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lwm.core.errors import InputError
from lwm.curation.captions import CaptionedFile, captioned_files, find_pictures


def picture(file: Path, caption: str | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as opened:
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(opened, format="PNG")
    if caption is not None:
        file.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures in an order that is not that of their making."""
    folder = tmp_path / "pictures"
    picture(folder / "b.png", "a bear\n")
    picture(folder / "a" / "cat.png", "\ufeffa cat")
    picture(folder / "z")  # known by its content
    (folder / "broken.mp4").write_bytes(b"nothing")
    (folder / "notes.md").write_text("no picture", encoding="utf-8")
    (folder / "empty").write_bytes(b"")
    picture(folder / ".hidden" / "c.png", "unseen")
    return folder


def captions(files: tuple[CaptionedFile, ...]) -> dict[str, tuple[str, ...]]:
    return {file.source: file.captions for file in files}


def test_folders_are_searched_in_the_order_of_names(folder: Path) -> None:
    sources = [file.source for file in find_pictures([folder])]
    assert sources == ["a/cat.png", "b.png", "broken.mp4", "z"]


def test_a_file_that_is_named_twice_comes_once(folder: Path) -> None:
    sources = [file.source for file in find_pictures([folder / "a" / "cat.png", folder])]
    assert sources == ["cat.png", "b.png", "broken.mp4", "z"]


def test_captions_lie_beside_their_files(folder: Path) -> None:
    found = captioned_files([folder])
    assert captions(found.files) == {"a/cat.png": ("a cat",), "b.png": ("a bear",)}
    assert found.uncaptioned == ("broken.mp4", "z")
    kept = captioned_files([folder], uncaptioned="keep")
    assert captions(kept.files) == captions(found.files) | {"broken.mp4": (), "z": ()}
    assert kept.uncaptioned == ()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("told.csv", 'file,caption,by\nz,"one, two",me\nz,again,me\na/cat.png,,me\n'),
        (
            "told.jsonl",
            '{"file": "z", "caption": "one, two"}\n\n{"file": "z", "caption": " again "}\n',
        ),
        ("told.csv", '\ufefffile,caption\npictures/z,"one, two"\nPLACE/z,again\n'),
    ],
)
def test_manifests_name_files_and_may_do_so_again(folder: Path, name: str, text: str) -> None:
    manifest = folder.parent / name
    manifest.write_text(text.replace("PLACE", str(folder)), encoding="utf-8")
    found = captioned_files([folder], manifest)
    assert captions(found.files) == {
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
def test_manifests_that_cannot_be_followed(
    folder: Path, name: str, text: str, message: str
) -> None:
    manifest = folder.parent / name
    manifest.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        captioned_files([folder], manifest)


def test_manifests_that_cannot_be_read(folder: Path) -> None:
    with pytest.raises(InputError, match=r"a.csv cannot be read \(No such file"):
        captioned_files([folder], folder / "a.csv")
    (folder / "a.csv").write_bytes(b"file,caption\nz,\xff\n")
    with pytest.raises(InputError, match="not UTF-8"):
        captioned_files([folder], folder / "a.csv")


def test_a_name_of_two_files_is_refused(folder: Path, tmp_path: Path) -> None:
    picture(tmp_path / "more" / "z")
    manifest = tmp_path / "a.csv"
    manifest.write_text("file,caption\nz,x\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"line 2: 'z' may be .*pictures/z or .*more/z"):
        captioned_files([folder, tmp_path / "more"], manifest)


def test_a_caption_that_cannot_be_read_costs_its_file(folder: Path) -> None:
    (folder / "b.txt").write_bytes(b"\xff")
    found = captioned_files([folder])
    assert captions(found.files) == {"a/cat.png": ("a cat",)}
    assert len(found.faults) == 1
    assert "b.txt is not UTF-8" in found.faults[0]
    with pytest.raises(InputError, match=r"caption that can be read: .*b.txt is not UTF-8"):
        captioned_files([folder / "b.png"])


def test_places_without_pictures_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="nothing to look at"):
        captioned_files([])
    with pytest.raises(InputError, match="gone does not exist"):
        captioned_files([folder / "gone"])
    (folder / "none").mkdir()
    with pytest.raises(InputError, match="none holds no images or videos"):
        captioned_files([folder / "none"])
    with pytest.raises(InputError, match="none of 1 files has a caption, z for one"):
        captioned_files([folder / "z"])
