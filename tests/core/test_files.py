"""Check from the file system that files and directories appear complete or not at all."""

import errno
import os
from pathlib import Path

import pytest

from lwm.core.errors import InputError
from lwm.core.files import new_directory, new_file, refuse_existing


def test_a_directory_appears_with_everything_in_it(tmp_path: Path) -> None:
    destination = tmp_path / "a" / "model"
    with new_directory(destination) as partial:
        (partial / "weights").write_bytes(b"123")
        assert not destination.exists()
    assert (destination / "weights").read_bytes() == b"123"
    assert [path.name for path in destination.parent.iterdir()] == ["model"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fill(destination: Path) -> None:
        with new_directory(destination) as partial:
            (partial / "weights").write_bytes(b"123")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fill(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    stale = tmp_path / ".model.partial"
    stale.mkdir()
    (stale / "old").write_text("old")
    with new_directory(tmp_path / "model") as partial:
        (partial / "new").write_text("new")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_existing_destinations_are_refused_and_unchanged(tmp_path: Path, kind: str) -> None:
    destination = tmp_path / "model"
    if kind == "directory":
        destination.mkdir()
    elif kind == "file":
        destination.write_text("mine")
    else:
        destination.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="exists"), new_directory(destination):
        pytest.fail("the block must not run")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(InputError, match=str(destination)):
        refuse_existing(destination)


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    destination = tmp_path / "file" / "model"
    with pytest.raises(InputError, match="cannot be written"), new_directory(destination):
        pytest.fail("the block must not run")


def test_a_file_appears_complete_and_keeps_its_suffix(tmp_path: Path) -> None:
    destination = tmp_path / "out.json"
    with new_file(destination) as partial:
        partial.write_text("{}")
        assert partial.suffix == ".json"
        assert not destination.exists()
    assert destination.read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_failed_file_leaves_what_was_there(tmp_path: Path, replace: bool) -> None:
    destination = tmp_path / "out.json"
    if replace:
        destination.write_text("old")
    before = sorted(tmp_path.iterdir())

    def fill() -> None:
        with new_file(destination, replace=replace) as partial:
            partial.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fill()
    assert sorted(tmp_path.iterdir()) == before
    assert not replace or destination.read_text() == "old"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (OSError("encoder error -2 when writing"), "encoder error -2"),
    ],
)
def test_a_disk_that_fills_up_is_refused_by_name(
    tmp_path: Path, error: OSError, reason: str
) -> None:
    destination = tmp_path / "out.png"
    destination.write_text("old")

    def fill() -> None:
        with new_file(destination, replace=True) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(InputError, match=rf"out\.png cannot be written: {reason}.*name another"):
        fill()
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    assert destination.read_text() == "old"


def test_a_file_is_replaced_only_on_request(tmp_path: Path) -> None:
    destination = tmp_path / "out.json"
    destination.write_text("old")
    with pytest.raises(InputError, match="exists"), new_file(destination):
        pytest.fail("the block must not run")
    with new_file(destination, replace=True) as partial:
        partial.write_text("new")
    assert destination.read_text() == "new"


def test_a_file_needs_its_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"), new_file(tmp_path / "no" / "a.json"):
        pytest.fail("the block must not run")


def test_an_error_of_another_file_is_not_blamed_on_the_destination(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_file(tmp_path / "out.json") as partial:
        partial.write_bytes((tmp_path / "missing").read_bytes())
    assert list(tmp_path.iterdir()) == []
