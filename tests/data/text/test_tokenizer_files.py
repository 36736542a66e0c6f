"""Test the files beside a tokenizer: halves of surrogate pairs and values of wrong types."""

import json
from pathlib import Path

import pytest
from random_llama import save_random_llama

from lwm.core.errors import LwmError
from lwm.data.text.tokenizer import read_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_random_llama(directory)
    return directory


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", '{"chat_template": "\\ud800{{ messages }}"}'),
        ("tokenizer_config.json", '{"bos_token": {"content": "\\udc00"}}'),
        ("special_tokens_map.json", '{"pad_token": "a\\uD8FF"}'),
        ("generation_config.json", '{"eos_token_id": [1], "\\ud800": 0}'),
        ("tokenizer_config.json", "[" * 100_000),
    ],
)
def test_files_with_halves_of_surrogate_pairs_are_refused(
    tmp_path: Path, tiny: Path, name: str, content: str
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(LwmError, match=rf"{name} is not valid JSON.*repair or replace it"):
        read_tokenizer(tmp_path)
    (tmp_path / name).write_text('{"chat_template": "\\ud83d\\ude00"}', encoding="utf-8")
    assert read_tokenizer(tmp_path).eos  # a whole pair is a character


@pytest.mark.parametrize("value", [None, True, [1.5, "1"], {"content": 3}, 1e400, -1, 2**70])
def test_settings_of_wrong_types_are_ignored(tmp_path: Path, tiny: Path, value: object) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    plain = read_tokenizer(tmp_path)
    names = ("bos_token", "eos_token", "pad_token", "chat_template")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict.fromkeys(names, value)))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    wrong = read_tokenizer(tmp_path)
    assert (wrong.bos, wrong.eos, wrong.chat_template) == (plain.bos, plain.eos, None)
    assert wrong.encode("the question") == plain.encode("the question")


def test_rules_that_fail_when_they_are_used_are_refused(tmp_path: Path, tiny: Path) -> None:
    data = json.loads((tiny / "tokenizer.json").read_text(encoding="utf-8"))
    data["post_processor"]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(LwmError, match=r"tokenizer.json is not a tokenizer.json.*replace it"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("token", [2**24, 2**32 - 1])
def test_ids_beyond_all_vocabularies_are_refused(tmp_path: Path, tiny: Path, token: int) -> None:
    data = json.loads((tiny / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.__getitem__)] = token
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(LwmError, match=rf"the id {token:,}, and ids below 16,777,216"):
        read_tokenizer(tmp_path)
    vocabulary[max(vocabulary, key=vocabulary.__getitem__)] = 2**24 - 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    assert read_tokenizer(tmp_path).encode("the question")
