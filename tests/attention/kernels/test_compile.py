"""Check that C sources are compiled once, cached, rebuilt when damaged, or refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from lwm.attention.kernels.compile import CompilerError, compile_c_function

with_a_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler here"
)
SOURCE = """#include "xla/ffi/api/c_api.h"
#ifndef NUMBER
#define NUMBER 3
#endif
int number(void) { return NUMBER; }
"""


@pytest.fixture(autouse=True)
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("CC", "CFLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "number.c"
    source.write_text(SOURCE)
    return source


def cached_files(tmp_path: Path) -> dict[str, Any]:
    files = (tmp_path / "cache" / "lwm").glob("*")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@with_a_compiler
def test_a_library_is_compiled_once_per_source_and_flags(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compile_c_function(source, "number")() == 3
    first = cached_files(tmp_path)
    assert len(first) == 1
    assert compile_c_function(source, "number")() == 3
    assert cached_files(tmp_path) == first
    source.write_text(SOURCE.replace("NUMBER 3", "NUMBER 4"))
    assert compile_c_function(source, "number")() == 4
    monkeypatch.setenv("CFLAGS", "-DNUMBER=5 -w")
    assert compile_c_function(source, "number")() == 5
    assert len(cached_files(tmp_path)) == 3
    assert cached_files(tmp_path).items() > first.items()


@with_a_compiler
@pytest.mark.parametrize("damage", [b"", b"no library"])
def test_a_damaged_library_is_compiled_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    compile_c_function(source, "number")
    (good,) = (tmp_path / "elsewhere" / "lwm").iterdir()
    # In another directory, since a loaded library stays loaded under its path.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library = tmp_path / "cache" / "lwm" / good.name
    library.parent.mkdir(parents=True)
    library.write_bytes(damage)
    assert compile_c_function(source, "number")() == 3
    assert library.read_bytes() == good.read_bytes()


@with_a_compiler
@pytest.mark.parametrize("place", ["a file", "a directory that others may write to"])
def test_without_a_usable_cache_it_is_compiled_for_this_process_only(
    source: Path, tmp_path: Path, place: str
) -> None:
    cache = tmp_path / "cache" / "lwm"
    cache.parent.mkdir()
    if place == "a file":
        cache.touch()
    else:
        cache.mkdir()
        cache.chmod(0o777)
    assert compile_c_function(source, "number")() == 3
    assert cached_files(tmp_path) == {}


@with_a_compiler
def test_a_compilation_error_is_reported_with_the_compilers_reason(
    source: Path, tmp_path: Path
) -> None:
    source.write_text(SOURCE.replace("NUMBER;", "#error;"))
    with pytest.raises(CompilerError, match=r"does not compile number\.c: .*error: "):
        compile_c_function(source, "number")
    assert cached_files(tmp_path) == {}


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", "there is no C compiler; install gcc or clang"),
        ("false", "false does not compile number.c"),
        ('"', "number.c cannot be compiled: No closing quotation"),
        ("  ", "there is no C compiler"),
    ],
)
def test_an_unusable_compiler_is_reported(
    source: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, message: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(CompilerError, match=message):
        compile_c_function(source, "number")
