"""Damage files of every kind at random: reading them gives a result or an LwmError, in little time
and memory. `make fuzz` runs more cases."""

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from file_kinds import KINDS

from lwm.core.errors import LwmError

CASES = int(os.environ.get("LWM_FUZZ_CASES", "50"))
SECONDS, BYTES = 10.0, 1 << 30
NUMBERS = (0, 1, 127, 128, 255, 2**15 - 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**64 - 1)
VALUES = (
    None, True, 0, -1, 1.5, 10**30, float("nan"), float("inf"), "", "x", "\ud800", "a" * 3000,
    [], {}, [[]], [None], {"": 0}, [[[[[[[[]]]]]]]], 2**31, -(2**63), "../x", "\x00",
    "{{ 1 / 0 }}",
)  # fmt: skip


def damaged(data: bytes, choice: random.Random) -> bytes:
    """Flip, cut, remove, repeat or replace parts of the bytes."""
    result = bytearray(data)
    for _ in range(choice.choice((1, 1, 1, 2, 5))):
        if not result:
            break
        # Headers decide more than the rest.
        end = len(result) if choice.random() < 0.5 else min(len(result), 400)
        at = choice.randrange(end)
        length = min(choice.choice((1, 2, 4, 8, 40, 1000)), len(result) - at)
        match choice.randrange(6):
            case 0:
                result[at] ^= 1 << choice.randrange(8)
            case 1:
                del result[at:]
            case 2:
                del result[at : at + length]
            case 3:
                result[at:at] = result[at : at + length] * choice.choice((1, 3))
            case 4:
                size = choice.choice((1, 2, 4, 8))
                number = choice.choice(NUMBERS) & ((1 << 8 * size) - 1)
                result[at : at + size] = number.to_bytes(size, choice.choice(("little", "big")))
            case _:
                result[at : at + length] = choice.randbytes(length)
    return bytes(result)


def changed(value: Any, choice: random.Random) -> Any:
    """Replace one value somewhere in JSON data, or remove it."""
    if isinstance(value, dict | list) and value and choice.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = choice.choice(keys)
        copy: Any = value.copy()
        if choice.random() < 0.1:
            del copy[key]
        else:
            copy[key] = changed(value[key], choice)
        return copy
    return choice.choice(VALUES)


def mutate(file: Path, data: bytes, choice: random.Random) -> None:
    if file.suffix in (".json", ".jsonl") and choice.random() < 0.7:
        lines = data.splitlines() if file.suffix == ".jsonl" else [data]
        at = choice.randrange(len(lines))
        lines[at] = json.dumps(changed(json.loads(lines[at]), choice)).encode()
        file.write_bytes(b"\n".join(lines))
    else:
        file.write_bytes(damaged(data, choice))


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
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
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
        mutate(file, contents[file], choice)
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
