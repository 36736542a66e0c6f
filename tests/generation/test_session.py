"""Check that saved conversations continue on any mesh with the same words."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_vision_model import CONFIG, model, tokenizer, weights

from lwm.core.errors import InputError
from lwm.core.mesh import make_mesh
from lwm.core.params import shardings
from lwm.core.sharding import DECODE
from lwm.generation.model import Model
from lwm.generation.session import load_session, save_session
from lwm.models.llama import llama_params

CODES = np.arange(12).reshape(3, 4)
HOW: dict[str, Any] = {"max_tokens": 12, "template": "original"}


def opening() -> list[dict[str, Any]]:
    shown = {"type": "codes", "codes": CODES}
    return [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, shown]}]


def talk(talker: Model, messages: list[Any], question: str) -> str:
    """Ask a question and append both turns to the messages."""
    if question:
        messages.append({"role": "user", "content": question})
    answer = talker.chat(messages, **HOW)
    messages.append({"role": "assistant", "content": answer})
    return answer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Save a session of one question; return it with the same model's next answer."""
    path, talker = tmp_path_factory.mktemp("session") / "talk.session", model()
    messages: list[Any] = opening()
    talk(talker, messages, "")
    save_session(path, talker, messages)
    return path, talk(talker, messages, "why?")


def test_a_session_continues_without_prefill(saved: tuple[Path, str]) -> None:
    path, expected = saved
    other = model()
    messages: list[Any] = load_session(path, other)
    assert messages[0]["content"][1] == {"type": "codes", "codes": CODES.tolist()}
    assert talk(other, messages, "why?") == expected
    assert other.timings.reused >= other.timings.prompt - len("why? USER: ASSISTANT: </s>") - 8


def test_a_session_loads_into_a_free_slot(saved: tuple[Path, str]) -> None:
    path, expected = saved
    other = model()
    engine = other.engine_for(200, 12, slots=2)
    talk(other, [], "something else")
    messages: list[Any] = load_session(path, other)
    assert engine.scheduler.longest_slot()[0] == 1
    assert talk(other, messages, "why?") == expected
    assert other.timings.reused > 80


def test_a_broken_session_leaves_a_model_that_works(
    saved: tuple[Path, str], tmp_path: Path
) -> None:
    path, _ = saved
    with safe_open(path, framework="numpy") as file:
        facts = file.metadata()
    arrays = load_file(path)
    name = f"values.{CONFIG.num_layers - 1}"
    save_file(arrays | {name: arrays[name][:, :-1].copy()}, tmp_path / "cut", metadata=facts)
    other = model()
    with pytest.raises(InputError, match=f"{name} has the shape"):
        load_session(tmp_path / "cut", other)
    assert talk(other, opening(), "") == talk(model(), opening(), "")
    assert other.timings.reused == 0


def test_a_session_continues_on_a_ring(saved: tuple[Path, str]) -> None:
    """Check that a session loads on a ring, and one saved on the ring on a single device."""
    path, expected = saved
    mesh = make_mesh("1,1,1,4")
    laid = shardings(llama_params(CONFIG, stacked=False), mesh, DECODE)
    ring = Model(
        source="ring", config=CONFIG, open_tokenizer=tokenizer, dtype="float32", mesh=mesh,
        weights=jax.device_put(weights(), laid),
    )  # fmt: skip
    messages: list[Any] = load_session(path, ring)
    again = path.with_name("ring.session")
    save_session(again, ring, messages)
    assert talk(ring, messages, "why?") == expected
    assert ring.timings.reused > 80
    alone = model()
    messages = load_session(again, alone)
    assert talk(alone, messages, "why?") == expected
    assert alone.timings.reused > 80


def test_files_that_are_no_session_of_the_model_are_refused(
    saved: tuple[Path, str], tmp_path: Path
) -> None:
    path, _ = saved
    with pytest.raises(InputError, match="of another model"):
        load_session(path, model(replace(CONFIG, rope_theta=5e5)))
    data = path.read_bytes()
    for name, content in (
        ("cut", data[: len(data) // 2]), ("none", b""), ("text", b"no session at all" * 9),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name} cannot be read"):
            load_session(tmp_path / name, model())
    with pytest.raises(InputError, match="nowhere"):
        load_session(tmp_path / "nowhere", model())
