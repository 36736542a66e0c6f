"""Damage files of every kind at random: reading them gives a result or an LwmError, in little time
and memory. `make fuzz` runs more cases."""

import os
import random
import time
from pathlib import Path

import file_kinds
import pytest
import written_kinds
from mutations import mutated

from lwm.core.errors import LwmError

CASES = int(os.environ.get("LWM_FUZZ_CASES", "50"))
SECONDS, BYTES = 10.0, 1 << 30
KINDS = file_kinds.KINDS | written_kinds.KINDS


def memory(key: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{key}:")[1].split()[0]) << 10


def reset_peak() -> int:
    """Let the peak memory begin at the current one, and return that."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return memory("VmRSS")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_give_a_result_or_a_sentence(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # for unpacked files
    write, read = KINDS[kind]
    directory = tmp_path / "files"
    directory.mkdir()
    write(directory)
    read(directory)  # the files are valid
    contents = {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
    faults, before = [], reset_peak()
    for number in range(CASES):
        choice = random.Random(f"{kind} {number}")
        file = choice.choice([*contents])
        file.write_bytes(mutated(contents[file], choice))
        started = time.perf_counter()
        try:
            read(directory)
        except LwmError as error:
            if "\n" in str(error):
                faults.append(f"{number}: {error!r} has several lines")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # also panics of libraries in Rust
            faults.append(f"{number}, {file.name}: {type(error).__name__}: {str(error)[:200]}")
        seconds, more = time.perf_counter() - started, memory("VmHWM") - before
        if seconds > SECONDS or more > BYTES:
            faults.append(f"{number}, {file.name}: {seconds:.1f} s and {more >> 20} MiB")
            before = reset_peak()
        file.write_bytes(contents[file])
        capfd.readouterr()
    assert not faults, "\n".join(faults)
