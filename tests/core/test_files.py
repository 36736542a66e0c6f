"""Directories that appear whole or not at all, seen from the file system."""

from pathlib import Path

import pytest

from lwm.core.errors import InputError
from lwm.core.files import new_directory, refuse_existing


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


def test_leavings_of_a_killed_run_do_not_enter(tmp_path: Path) -> None:
    stale = tmp_path / ".model.partial"
    stale.mkdir()
    (stale / "old").write_text("old")
    with new_directory(tmp_path / "model") as partial:
        (partial / "new").write_text("new")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_what_exists_is_refused_and_untouched(tmp_path: Path, kind: str) -> None:
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
