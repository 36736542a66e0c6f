"""Check that only the assistant's words and ends of turns carry loss, and that tokens equal a
chat's."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import tokenizer

from lwm.core.errors import ConfigError
from lwm.core.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, Piece, Vocabulary
from lwm.data.examples.conversations import ConversationEncoder, encode_continuation
from lwm.data.examples.examples import Broken
from lwm.data.text.templates import TEMPLATES, render
from lwm.data.text.tokenizer import Tokenizer, from_vocabulary

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who was Ruth?"},
    {"role": "assistant", "content": "A Moabite."},
    {"role": "user", "content": "And Boaz?"},
    {"role": "assistant", "content": "Her husband."},
]
WORDS = ["▁", "U", "S", "E", "R", ":", "a", "b", "▁a", "ab", "▁ab", "A", "I", "T", "N"]


@cache
def prefixing() -> Tokenizer:
    """Return a tokenizer that puts a space before every text, as in Llama 2."""
    pieces = [Piece("<unk>", 0, UNKNOWN), Piece("<s>", 0, CONTROL), Piece("</s>", 0, CONTROL)]
    pieces += [Piece(f"<0x{byte:02X}>", 0, BYTE) for byte in range(256)]
    pieces += [Piece(word, -float(i), NORMAL) for i, word in enumerate(WORDS)]
    return from_vocabulary(Vocabulary(method="pieces", pieces=tuple(pieces), bos=1, eos=2))


@cache
def chatml() -> Tokenizer:
    marked = tokenizer()
    backend = type(marked.backend).from_str(marked.backend.to_str())
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    end = backend.token_to_id("<|im_end|>")
    return replace(marked, backend=backend, eos=(end,))


def encode(
    messages: Any, encoding: Tokenizer | None = None, template: str = "original"
) -> tuple[list[int], list[float]]:
    encoder = ConversationEncoder(
        tokenizer=encoding or tokenizer(), key="messages", template=template
    )
    made = encoder({"messages": messages}, 1)
    assert made is not None
    return made.tokens.tolist(), made.weights.tolist()


def trained_text(encoding: Tokenizer, tokens: list[int], weights: list[float]) -> list[str]:
    spans, last = [], 0.0
    for token, weight in zip(tokens, weights, strict=True):
        if weight:
            if not last:
                spans.append([])
            spans[-1].append(token)
        last = weight
    return [encoding.backend.decode(part, skip_special_tokens=False) for part in spans]


def test_original_template() -> None:
    tokens, weights = encode(CHAT)
    assert trained_text(tokenizer(), tokens, weights) == [" A Moabite.</s>", " Her husband.</s>"]


def test_chatml_loss_ends_with_end_of_turn() -> None:
    """Check that the line end after the end of turn carries no loss."""
    tokens, weights = encode(CHAT, chatml(), "chatml")
    assert trained_text(chatml(), tokens, weights) == [
        "A Moabite.<|im_end|>",
        "Her husband.<|im_end|>",
    ]


def test_turn_that_ends_with_plain_text_has_loss_to_its_end() -> None:
    encoding = replace(
        tokenizer(),
        chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
    tokens, weights = encode(CHAT, encoding, "auto")
    assert trained_text(encoding, tokens, weights) == ["A Moabite.\n\n", "Her husband.\n\n"]


@pytest.mark.parametrize("template", ["original", "chatml"])
def test_tokens_decode_to_the_rendered_conversation(template: str) -> None:
    tokens, _ = encode(CHAT, template=template)
    text = render(TEMPLATES[template], CHAT, tokenizer(), add_generation_prompt=False)
    assert tokenizer().backend.decode(tokens, skip_special_tokens=False) == text


def test_messages_after_the_last_answer_are_omitted() -> None:
    more = [*CHAT, {"role": "user", "content": "Thanks."}]
    assert encode(more) == encode(CHAT)


@pytest.mark.parametrize("encoding", [tokenizer(), prefixing()])
def test_prompt_tokens_equal_a_chat(encoding: Tokenizer) -> None:
    """Check that the tokens up to an answer equal the tokens of the prompt text."""
    chat = [{"role": "user", "content": "ab a"}, {"role": "assistant", "content": "ab"}] * 2
    tokens, weights = encode(chat, encoding)
    first = weights.index(1.0)
    asked = render(TEMPLATES["original"], chat[:1], encoding)
    assert tokens[:first] == encoding.encode_controlled(asked)
    second = first + weights[first:].index(0.0)
    again = second + weights[second:].index(1.0)
    asked = render(TEMPLATES["original"], chat[:3], encoding)
    assert tokens[:again] == encoding.encode_controlled(asked)


def test_no_space_is_added_inside_a_text() -> None:
    assert prefixing().encode("ab", specials=False) == [prefixing().backend.token_to_id("▁ab")]
    assert encode_continuation(prefixing(), "ab") == [prefixing().backend.token_to_id("ab")]
    assert encode_continuation(prefixing(), " ab") == [prefixing().backend.token_to_id("▁ab")]
    assert encode_continuation(prefixing(), "") == []


@given(st.text(min_size=1))
def test_continuation_decodes_to_its_text(text: str) -> None:
    for encoding in (tokenizer(), prefixing()):
        before = encoding.encode("x:", specials=False)
        after = encode_continuation(encoding, text)
        whole = encoding.backend.decode(before + after, skip_special_tokens=False)
        assert whole == encoding.backend.decode(
            encoding.encode("x:" + text, specials=False), skip_special_tokens=False
        )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("text", "holds text, where a list of messages"),
        (["text"], "where a list of messages"),
        ([{"role": "user"}], "is malformed"),
        ([{"role": "wizard", "content": "a"}], "is malformed"),
        ([{"role": "tools", "content": "a " * 9999}], r"\.\.\. is malformed"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "is malformed"),
        ([{"role": "user", "content": [{"type": "text"}]}], "is malformed"),
        ([{"role": "assistant", "content": "a"}], "another must precede"),
        ([CHAT[1], {"role": "assistant", "content": "\ud800"}], "half of a surrogate pair"),
    ],
)
def test_broken_messages(messages: Any, message: str) -> None:
    with pytest.raises(Broken, match=message) as raised:
        encode(messages)
    assert len(str(raised.value)) < 300


def test_text_parts_are_joined() -> None:
    question = [{"type": "text", "text": "Who was"}, {"type": "text", "text": "Ruth?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A Moabite."}]}
    parts = [{"role": "user", "content": question}, answer]
    plain = [
        {"role": "user", "content": "Who was\nRuth?"},
        {"role": "assistant", "content": "A Moabite."},
    ]
    assert encode(parts) == encode(plain)


def test_template_that_rewrites_earlier_turns_is_refused() -> None:
    encoding = replace(
        tokenizer(),
        chat_template="{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    with pytest.raises(Broken, match="changes message 3 when"):
        encode(CHAT, encoding, "auto")


def test_no_messages_give_no_example_and_a_missing_key_is_broken() -> None:
    encoder = ConversationEncoder(tokenizer=tokenizer(), key="messages")
    assert encoder({"messages": []}, 1) is None
    with pytest.raises(Broken, match=r"no key 'messages' \(its keys: chat\)"):
        encoder({"chat": []}, 1)


def test_unknown_template() -> None:
    with pytest.raises(ConfigError, match="no chat template 'none'"):
        ConversationEncoder(tokenizer=tokenizer(), key="messages", template="none")
