"""Check chat templates against the original's prompts and transformers' `apply_chat_template`, and
that a checkpoint's template cannot escape its sandbox."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lwm.core.errors import CheckpointError, ConfigError, InputError
from lwm.data.text.templates import (
    CHATML,
    ORIGINAL,
    choose_template,
    render,
    with_turn_end,
)
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
    render("{{ messages }}{% set messages = [] %}{{ messages }}", turns, tokenizer)
    assert turns == TURNS


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "conversation is empty"),
        ([{"role": "robot", "content": "x"}], "malformed"),
        ([{"content": "x"}], "malformed"),
        ([{"role": "user"}], "malformed"),
        ([{"role": "user", "content": 3}], "malformed"),
        ([{"role": "assistant", "tool_calls": []}], "malformed"),
        ([{"role": ["user"], "content": "x"}], "malformed"),
    ],
)
def test_malformed_messages_are_refused(
    tokenizer: Tokenizer, messages: list[Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        render(ORIGINAL, messages, tokenizer)


# The constructs of the templates of Llama 2 and 3, Mistral, Zephyr, Gemma, Phi, Qwen, DeepSeek.
CONSTRUCTS = {
    "generation": "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}"
    "{% endif %}{% endfor %}",
    "tojson": "{% for m in messages %}{{ m.content | tojson(ensure_ascii=True) }}"
    "{{ m | tojson(indent=2, sort_keys=True, separators=(',', ' : ')) }}{% endfor %}",
    "tools": "{% if tools is not none or documents %}tools{% endif %}"
    "{%- if tools is defined %}defined{% endif %}{{ messages }}",
    "tokens": "{{ pad_token }}{{ unk_token }}{{ bos_token }}{{ cls_token is defined }}"
    "{{ messages }}",
    "date": "{{ strftime_now('%Y') }}{% if not date_string is defined %}{% set date_string = "
    "'26 Jul 2024' %}{% endif %}{{ date_string }}{{ messages }}",
    "namespace": "{% set ns = namespace(first=true, text='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' and ns.first %}{% set ns.text = m['content'] %}{% continue %}"
    "{% endif %}{{ ns.text + m['content'] | trim }}{% set ns.first = false %}{% endfor %}",
    "slices": "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{{ '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>' }}{% else %}{% set rest = messages %}"
    "{% endif %}{% for m in rest %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('odd') }}{% endif %}"
    "{{ '[INST] ' ~ m.content.strip() ~ ' [/INST]' }}{{ loop.last }}{% endfor %}",
    "macros": "{% macro turn(role, text) -%}"
    "<start>{{ role }}\n{{ text | trim }}<end>{%- endmacro %}"
    "{% for m in messages %}{{ turn('model' if m.role == 'assistant' else m.role, m.content) }}"
    "{% endfor %}{{ messages | map(attribute='role') | list | join(',') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "strings": "{% for m in messages %}{% set c = m.content %}{% if '</think>' in c %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}{{ c }}{{ c.startswith('A') }}"
    "{{ m.get('name', 'nobody') }}{% if m.tool_calls is defined %}call{% endif %}{% endfor %}",
    "whitespace": "{%- for m in messages -%}\n  {{- m.role }}:\n    {{ m.content }}\n\n"
    "{% endfor -%} \n",
}


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_constructs_render_as_in_transformers(
    backend: tokenizers.Tokenizer, tokenizer: Tokenizer, name: str
) -> None:
    others = {"pad_token": "<pad>", "unk_token": "<unk>"}
    names = {"bos_token": "<s>", "eos_token": "</s>", **others}
    peer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    ours = replace(tokenizer, other_tokens=others)
    turns = [turn | {"content": turn["content"].replace("<s>", "")} for turn in TURNS]
    for messages in (turns, turns[1:]):
        expected = peer.apply_chat_template(
            messages, chat_template=CONSTRUCTS[name], tokenize=False, add_generation_prompt=True
        )
        assert render(CONSTRUCTS[name], messages, ours) == expected


def test_developers_tools_and_messages_without_content(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]},
        {"role": "tool", "content": '{"sum": 2}'},
    ]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n"
        '<|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\n{"sum": 2}<|im_end|>\n'
        "<|im_start|>assistant\n"
    )
    assert render(CHATML, messages, tokenizer) == expected


@pytest.mark.parametrize(
    ("messages", "left_out"),
    [
        ([*TURNS[1:3], TURNS[0], TURNS[3]], "message 3, of the role 'system'"),
        ([TURNS[1], {"role": "tool", "content": "2"}], "message 2, of the role 'tool'"),
    ],
)
def test_words_that_a_template_leaves_out_are_refused(
    tokenizer: Tokenizer, messages: list[Any], left_out: str
) -> None:
    with pytest.raises(InputError, match=left_out):
        render(ORIGINAL, messages, tokenizer)
    assert "Answer  briefly." in render(CHATML, TURNS, tokenizer)


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, ["</s>", "<|im_end|>"]),
        (ORIGINAL, ["</s>"]),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", ["</s>"]),
        ("{% for m in messages %}{{ m.content }} <turn>\n{% endfor %}", ["</s>", "<turn>"]),
        ("{{ raise_exception('no') }}", ["</s>"]),
    ],
)
def test_the_end_of_a_turn_is_taken_from_the_template(template: str, ends: list[str]) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "word": 1}, unk_token="<unk>"))
    backend.add_special_tokens(["</s>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens(["<turn>"])  # user-defined: marks a turn as well, without being special
    ids = backend.get_vocab()
    changed = with_turn_end(Tokenizer(backend=backend, eos=(ids["</s>"],)), template)
    assert list(changed.eos) == [ids[end] for end in ends]


def test_tokens_beyond_the_model_are_refused_where_they_occur(tokenizer: Tokenizer) -> None:
    limited = replace(tokenizer, limit=3)
    assert limited.encode("unknown") == [0]
    with pytest.raises(InputError, match=r"'word' is token 3, .* vocabulary of 3"):
        limited.encode("word")
