"""Make a tiny model and a task over its token ids, and evaluate them.

Run as a program it is one of two processes: `tiny_evaluation.py WORK COORDINATOR PROCESS`, with
the model in WORK/tiny. Its results go to WORK/PROCESS.json.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

import lwm
from lwm.checkpoints.formats.lwm import write_lwm_config
from lwm.checkpoints.formats.safetensors import write_safetensors
from lwm.core.distributed import DistributedConfig, first_process, join, together
from lwm.core.errors import InputError, LwmError
from lwm.core.params import initialize
from lwm.evaluation.answering import ModelAnswerer
from lwm.evaluation.results import ROWS, Key, Results
from lwm.evaluation.task import Case, Verdict, evaluate
from lwm.models.llama import LlamaConfig, llama_params

# Large weights, so that every order of sums agrees on which token is likeliest.
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4, num_kv_heads=2,
    head_dim=8, max_sequence_length=512, initializer_range=0.3,
)  # fmt: skip
WORDS = [f"w{i}" for i in range(CONFIG.vocab_size)]
END = CONFIG.vocab_size - 1
KEYS = ("context_length", "seed")
MESH = "sp:2,tp:2,dp:1,fsdp:1"
"""Four devices; the ring goes from one process to the other."""


def words(length: int, seed: int) -> list[int]:
    return np.random.default_rng([length, seed]).integers(0, END, length).tolist()


class Continue:
    """Continue random words; the ideal answer is random, too."""

    name = "continue"

    def __init__(self, lengths: Sequence[int] = (30, 70), seeds: int = 2) -> None:
        self._lengths, self._seeds = lengths, seeds

    def units(self) -> Sequence[Sequence[Key]]:
        return [
            [{"context_length": length, "seed": seed} for seed in range(self._seeds)]
            for length in self._lengths
        ]

    def case(self, key: Key) -> Case:
        length, seed = int(key["context_length"]), int(key["seed"])
        prompt = [*words(length, 0)[: length // 2], *words(length - length // 2, seed)]
        return Case(prompt=prompt, target=words(3, seed), max_tokens=5, reference=length)

    def judge(self, case: Case, response: str) -> Verdict:
        return "w1" in response


def write_model(directory: Path) -> Path:
    """Write the model, and a tokenizer with one token for each word."""
    directory.mkdir()
    write_lwm_config(directory, CONFIG, "float32")
    weights = initialize(llama_params(CONFIG, stacked=False), jax.random.key(1), jnp.float32)
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    named = [(jax.tree_util.keystr(path, simple=True, separator="."), x) for path, x in leaves]
    write_safetensors(directory, ((name, np.asarray(x)) for name, x in named))
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    backend.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": WORDS[END]}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def evaluate_tiny(model: lwm.Model, out: Path) -> dict[str, Any]:
    """Return logits and the rows of two runs: one by generation, which is interrupted after a unit
    in the middle of a line, and one by logits."""
    settings = {"model": "tiny"}
    logits = model.logits([words(37, seed) for seed in range(3)]).text
    opened = partial(Results, out / "written", settings, KEYS)
    evaluate(Continue(lengths=[30]), ModelAnswerer(model, 200), opened())
    if first_process():
        with (out / "written" / ROWS).open("a", encoding="utf-8") as file:
            file.write('{"context_length": 70, "se')
    new_rows: list[Any] = []
    written = evaluate(Continue(), ModelAnswerer(model, 200), opened(), on_row=new_rows.append)
    results = Results(out / "followed", settings, KEYS)
    followed = evaluate(Continue(), ModelAnswerer(model, 200), results, score="logits")
    return {
        "logits": logits.tolist(), "written": written, "followed": followed,
        "new rows": len(new_rows),
    }  # fmt: skip


def refused(work: Any) -> str:
    """Return the error that every process raises."""
    try:
        work()
    except LwmError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _one_of_two(work: Path, coordinator: str, process: int) -> None:
    join(DistributedConfig(coordinator=coordinator, processes=2, process=process))

    def missing_here() -> None:
        with together():
            if process == 1:
                raise InputError("nothing at process 1")
            with together():
                pass

    outcome: dict[str, Any] = {"no mesh": refused(lambda: lwm.load(work / "tiny"))}
    outcome |= evaluate_tiny(lwm.load(work / "tiny", mesh=MESH), work / "two")
    outcome["another run"] = refused(
        lambda: Results(work / "two" / "written", {"model": "x"}, KEYS)
    )
    outcome["other flags"] = refused(lambda: Results(work / "new", {"seed": process}, KEYS))
    outcome["one process"] = refused(missing_here)
    (work / f"{process}.json").write_text(json.dumps(outcome), encoding="utf-8")


if __name__ == "__main__":
    _one_of_two(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
