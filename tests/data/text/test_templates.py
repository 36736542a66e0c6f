"""Check chat templates against the original's prompts and transformers' `apply_chat_template`, and
that a checkpoint's template cannot escape its sandbox."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lwm.core.errors import CheckpointError, ConfigError, InputError
from lwm.data.text.templates import CHATML, ORIGINAL, choose_template, render
from lwm.data.text.tokenizer import Tokenizer, read_tokenizer

TURNS = [
    {"role": "system", "content": "Answer  briefly."},
    {"role": "user", "content": "What is { this }? <s>"},
    {"role": "assistant", "content": "A book.\n"},
    {"role": "user", "content": 'And {{ that }} — & "it\'s"?'},
]
CUSTOM = """{{- bos_token }}
{%- for message in messages %}
    {%- if loop.index0 > 8 %}{% break %}{% endif %}
    {%- if message['role'] == 'user' %}
<user>{{ message['content'] | trim }}</user>
    {% else %}
        {{- '<' + message.role + '>' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}
"""


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "word": 3}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return backend


@pytest.fixture(scope="module")
def tokenizer(backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(backend=backend, bos="<s>", eos=(2,))


@pytest.mark.parametrize(
    "template", [ORIGINAL, CHATML, CUSTOM], ids=["original", "chatml", "custom"]
)
@pytest.mark.parametrize("turns", [TURNS, TURNS[1:], TURNS[:2], TURNS[3:]], ids=range(4))
def test_rendering_matches_transformers(
    backend: tokenizers.Tokenizer, tokenizer: Tokenizer, template: str, turns: list[Any]
) -> None:
    peer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    expected = peer.apply_chat_template(
        turns, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert render(template, turns, tokenizer) == expected


def test_the_original_prompt(tokenizer: Tokenizer) -> None:
    """Check the prompt of the original's scripts (LWM.md, section 4)."""
    text = render(ORIGINAL, [{"role": "user", "content": "What is it?"}], tokenizer)
    assert text == "<s>You are a helpful assistant. USER: What is it? ASSISTANT:"


def test_chatml_follows_its_definition(tokenizer: Tokenizer) -> None:
    text = render(CHATML, TURNS[:2], tokenizer)
    assert text == (
        "<|im_start|>system\nAnswer  briefly.<|im_end|>\n"
        "<|im_start|>user\nWhat is { this }? <s><|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_choice_of_a_template(backend: tokenizers.Tokenizer, tokenizer: Tokenizer) -> None:
    with_template = Tokenizer(backend=backend, chat_template=CUSTOM)
    assert choose_template("auto", with_template) == CUSTOM
    assert choose_template("auto", tokenizer) == ORIGINAL
    assert choose_template("original", with_template) == ORIGINAL
    assert choose_template("chatml", with_template) == CHATML
    with pytest.raises(ConfigError, match=r"'alpaca'.*auto, original or chatml"):
        choose_template("alpaca", with_template)


def test_templates_of_checkpoints(backend: tokenizers.Tokenizer, tmp_path: Path) -> None:
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = tmp_path / "tokenizer_config.json"
    assert read_tokenizer(tmp_path).chat_template is None
    settings.write_text(json.dumps({"chat_template": CUSTOM}), encoding="utf-8")
    assert read_tokenizer(tmp_path).chat_template == CUSTOM
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML}]
    settings.write_text(json.dumps({"chat_template": named}), encoding="utf-8")
    assert read_tokenizer(tmp_path).chat_template == CHATML
    (tmp_path / "chat_template.jinja").write_text(ORIGINAL, encoding="utf-8")
    assert read_tokenizer(tmp_path).chat_template == ORIGINAL
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xff")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja cannot be read"):
        read_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    for odd in ([1], [{"template": 3}], {"a": 1}, 7):
        settings.write_text(json.dumps({"chat_template": odd}), encoding="utf-8")
        assert read_tokenizer(tmp_path).chat_template is None


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__['InputError'] }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'] + 1 }}",
        "{% for message in messages %}",
        "{{ unknown_function() }}",
        "{{ raise_exception('roles must\nalternate') }}",
    ],
)
def test_broken_and_unsafe_templates_are_refused(tokenizer: Tokenizer, template: str) -> None:
    with pytest.raises(InputError, match="template") as raised:
        render(template, TURNS, tokenizer)
    assert "\n" not in str(raised.value)


def test_a_template_cannot_change_the_conversation(tokenizer: Tokenizer) -> None:
    turns = [dict(turn) for turn in TURNS]
    render("{% set messages = [] %}{{ messages }}", turns, tokenizer)
    assert turns == TURNS


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "conversation is empty"),
        ([{"role": "robot", "content": "x"}], "malformed"),
        ([{"content": "x"}], "malformed"),
        ([{"role": "user"}], "malformed"),
        ([{"role": "user", "content": 3}], "malformed"),
        ([{"role": "user", "content": None}], "malformed"),
        ([{"role": ["user"], "content": "x"}], "malformed"),
    ],
)
def test_malformed_messages_are_refused(
    tokenizer: Tokenizer, messages: list[Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        render(ORIGINAL, messages, tokenizer)
