"""Check `lwm eval perplexity` against transformers, on a mesh, when resumed, and its refusals."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Run
from random_llama import CONTEXT
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lwm.engine.scoring import Scorer

TEXT = " ".join(
    f"the question {n} and the answer {n * 7 % 10}, once upon a time" for n in range(60)
)
THETA = 20.0
"""So low that it changes the perplexity of a short text."""


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def rows_of(directory: Path) -> list[dict]:
    lines = (directory / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def peer_nll(tiny: Path, theta: float, length: int, rows: int, longest: int) -> np.ndarray:
    """Compute with transformers; rows end where a row of the longest length does."""
    ids = AutoTokenizer.from_pretrained(tiny)(TEXT, add_special_tokens=False)["input_ids"]
    size = longest + 1
    config = LlamaConfig.from_pretrained(tiny)
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    peer = LlamaForCausalLM.from_pretrained(tiny, config=config).eval()
    nll = []
    for row in range(rows):
        read = [0, *ids[: rows * size][row * size : (row + 1) * size][-length:]]
        with torch.no_grad():
            logits = peer(torch.tensor([read])).logits[0].double()
        scores = torch.log_softmax(logits, dim=-1)[range(length), read[1:]]
        nll.append(-scores.numpy())
    return np.stack(nll)


def test_perplexity_equals_transformers(run: Run, tiny: Path, book: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lengths, longest = (32, 200), 200
    ran = run(
        "eval", "perplexity", tiny, "--data", book, "--lengths", "32,200", "--rows", 3,
        "--theta", THETA, "--out", out,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    rows = rows_of(out)
    assert {(row["theta"], row["length"]) for row in rows} == {
        (1e4, 32), *((THETA, length) for length in lengths),
    }  # fmt: skip
    for theta, length in {(row["theta"], row["length"]) for row in rows}:
        expected = peer_nll(tiny, theta, length, 3, longest)
        measured = [row for row in rows if (row["theta"], row["length"]) == (theta, length)]
        assert sum(row["tokens"] for row in measured) == 3 * length
        for row in measured:
            part = expected[row["row"], row["bucket_from"] : row["bucket_to"]]
            np.testing.assert_allclose(row["nll"], part.mean(), atol=1e-3)
    last = next(line for line in ran.out.splitlines() if line.startswith("| last 32"))
    shown = float(last.split("|")[2])
    np.testing.assert_allclose(
        shown, np.exp(peer_nll(tiny, 1e4, 32, 3, longest).mean()), rtol=2e-3
    )
    assert (out / "perplexity.png").is_file()
    assert (out / "perplexity.svg").is_file()


def test_an_interrupted_run_resumes(
    run: Run, tiny: Path, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ("eval", "perplexity", tiny, "--data", book, "--lengths", "32", "--rows", 3,
               "--batch-tokens", 64)  # fmt: skip
    whole = run(*command, "--out", out)
    lines = (out / "results.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(lines[:-1]) + lines[-1][:9], encoding="utf-8")
    read = []
    score = Scorer.log_likelihoods
    monkeypatch.setattr(
        Scorer,
        "log_likelihoods",
        lambda self, tokens: read.append(len(tokens)) or score(self, tokens),
    )
    assert run(*command, "--out", out).out == whole.out
    assert read == [1]  # only the batch of the incomplete row
    assert (out / "results.jsonl").read_text(encoding="utf-8").splitlines(keepends=True) == lines
    assert run(*command, "--theta", THETA, "--out", out).code == 0  # adds to the same run
    ran = run(*command, "--rows", 2, "--out", out)
    assert ran.code == 2
    assert "its rows is 3 and not 2" in ran.err


def test_a_mesh_gives_the_same_rows(run: Run, tiny: Path, book: Path, tmp_path: Path) -> None:
    command = ("eval", "perplexity", tiny, "--data", book, "--lengths", "32", "--rows", 3)
    assert run(*command, "--out", tmp_path / "one").code == 0
    assert run(*command, "--mesh", "1,1,2,2", "--out", tmp_path / "four").code == 0
    for one, four in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "four"), strict=True):
        assert one | {"nll": 0} == four | {"nll": 0}
        np.testing.assert_allclose(four["nll"], one["nll"], atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lengths", str(CONTEXT + 1)), rf"length {CONTEXT + 1} .*which is {CONTEXT};.*--theta"),
        (("--lengths", "100", "--rows", "99"), r"has [\d,]+ tokens and 99 rows of 100 need 9,999"),
        (("--lengths", "ten"), "lengths is 'ten'"),
        (("--lengths", "10", "--rows", "0"), "rows is 0"),
        (("--lengths", "10", "--theta", "-1"), "theta is -1"),
        (("--lengths", "10", "--data", "missing.txt"), "missing.txt cannot be read"),
    ],
)
def test_impossible_measurements_are_refused(
    run: Run, tiny: Path, book: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "out"
    ran = run("eval", "perplexity", tiny, "--data", book, "--out", out, *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert re.search(message, ran.err)
    assert ran.err.count("\n") == 1
    assert not out.exists()
