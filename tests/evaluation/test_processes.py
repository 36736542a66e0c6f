"""Check an evaluation by two processes with a mesh over both against one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import tiny_evaluation
from tiny_evaluation import evaluate_tiny, write_model

import lwm
from lwm.evaluation.results import ROWS, read_results


def test_two_processes_give_the_rows_of_one(tmp_path: Path) -> None:
    """Check scoring, prefill, decode, resuming and refusals together: processes start slowly."""
    tiny = write_model(tmp_path / "tiny")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    inherited = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        # Not the suite's: this process compiles at the same time.
        "JAX_COMPILATION_CACHE_DIR": f"{jax.config.values['jax_compilation_cache_dir']}-two",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    arguments = [sys.executable, tiny_evaluation.__file__, str(tmp_path), coordinator]
    processes = [
        subprocess.Popen(
            [*arguments, str(number)], env=inherited, text=True, stderr=subprocess.PIPE
        )
        for number in range(2)
    ]
    one = evaluate_tiny(lwm.load(tiny), tmp_path / "one")
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    first, second = (
        json.loads((tmp_path / f"{number}.json").read_text(encoding="utf-8"))
        for number in range(2)
    )
    assert first.pop("new rows") == one["new rows"] == 2
    assert second.pop("new rows") == 0
    assert first == second
    np.testing.assert_allclose(first["logits"], one["logits"], atol=1e-4)
    assert len(one["written"]) == len(one["followed"]) == 4
    assert len({row["response"] for row in one["written"]}) > 1
    for name in ("written", "followed"):
        assert first[name] == one[name]
        assert read_results(tmp_path / "two" / name) == read_results(tmp_path / "one" / name)
    rows = [(tmp_path / run / "written" / ROWS).read_bytes() for run in ("one", "two")]
    assert rows[0] == rows[1]
    assert "ConfigError: there is no mesh, but 2 processes with 4 devices" in first["no mesh"]
    assert "--mesh" in first["no mesh"]
    assert "InputError" in first["another run"]
    assert "holds another run: its model is 'tiny' and not 'x'" in first["another run"]
    assert "its seed is 0 and not 1; start all of them with the same flags" in first["other flags"]
    assert not (tmp_path / "new").exists()
    assert first["one process"] == "InputError: nothing at process 1"
