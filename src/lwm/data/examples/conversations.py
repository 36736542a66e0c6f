"""Encode chats as examples in which only the assistant's words carry loss.

The assistant's words are located in any template's output by rendering the conversation step by
step: up to where the assistant answers, then with the answer. Each part is tokenized separately,
so that no token crosses a boundary, but as it would be inside the whole text, so that the tokens
are the same as in a chat.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lwm.core.errors import InputError
from lwm.data.examples.examples import Broken, Example, TooLong
from lwm.data.examples.fields import json_type, require_key, text_end
from lwm.data.text.templates import choose_template, render, text_content
from lwm.data.text.tokenizer import Tokenizer

_ANCHORS = ("\n", ":", ".")  # at least one of them never merges with the text after it


@dataclass(frozen=True, kw_only=True)
class ConversationEncoder:
    """Encode records that hold messages.

    Args:
        key: key of the list of messages.
        template: `auto` or the name of a template.
    """

    tokenizer: Tokenizer
    key: str
    template: str = "auto"

    def __post_init__(self) -> None:
        choose_template(self.template, self.tokenizer)

    def __call__(
        self, record: Mapping[str, Any], line: int, *, drop_prompt: bool = False
    ) -> Example | None:
        """Return the example, or None if there are no messages; raise `Broken`."""
        del line, drop_prompt  # for images and videos only
        return self._encoded(self._messages(record))

    def truncated(
        self, record: Mapping[str, Any], line: int, longest: int, *, drop_prompt: bool = False
    ) -> Example:
        """Return the end of the conversation, in at most `longest` tokens, after its first system
        messages: as many last turns as fit. If the last turn does not fit, its longest message to
        the assistant loses its beginning. Raise `TooLong` if that does not suffice."""
        del line, drop_prompt
        messages = self._messages(record)
        roles = [message.get("role") for message in messages]
        first = next(i for i, role in enumerate(roles) if role not in ("system", "developer"))
        end = len(roles) - roles[::-1].index("assistant")
        system = messages[:first]
        turns = [
            i
            for i in range(first + 1, end)
            if roles[i] not in ("assistant", "tool") and roles[i - 1] == "assistant"
        ]

        def since(start: int) -> Example:
            example = self._encoded([*system, *messages[start:end]])
            assert example is not None
            return replace(example, truncated=True)

        fitting = bisect_left(turns, True, key=lambda start: len(since(start)) <= longest)
        if fitting < len(turns):
            return since(turns[fitting])
        start = turns[-1] if turns else first
        asked = [i for i in range(start, end) if roles[i] != "assistant"]
        if not asked:
            raise TooLong
        texts = {i: text_content(messages[i].get("content")) or "" for i in asked}
        at = max(asked, key=lambda i: len(texts[i]))
        text, example = texts[at], since(start)
        while (excess := len(example) - longest) > 0:
            if not (text := text_end(self.tokenizer, text, excess)):
                raise TooLong
            messages[at] = {**messages[at], "content": text}
            example = since(start)
        return example

    def _messages(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        messages = require_key(record, self.key)
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            kind = json_type(messages)
            raise Broken(f"the key {self.key!r} holds {kind}, where a list of messages is needed")
        return list(messages)

    def _encoded(self, messages: list[dict[str, Any]]) -> Example | None:
        if not messages:
            return None
        tokens: list[int] = []
        weights: list[float] = []
        for text, loss in self._parts(messages):
            # Tokenizers treat text after a special token like the start of a text.
            begins = not tokens or tokens[-1] in self._specials
            encode = Tokenizer.encode_controlled if begins else encode_continuation
            try:
                encoded = encode(self.tokenizer, text)
            except InputError as error:
                raise Broken(str(error)) from error
            tokens += encoded
            weights += self._weights(encoded) if loss else [0.0] * len(encoded)
        return Example.of_text(tokens, weights)

    def _parts(self, messages: list[dict[str, Any]]) -> Iterator[tuple[str, bool]]:
        """Yield the parts of the conversation's text, and whether each is the assistant's."""
        text = ""
        whole = self._render(messages, ask=False)
        for number, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            if not number:
                raise Broken("its first message is the assistant's; another must precede")
            before = self._render(messages[:number], ask=True)
            after = self._render(messages[: number + 1], ask=False)
            in_order = before.startswith(text) and after.startswith(before)
            if not in_order or not whole.startswith(after):
                raise Broken(
                    f"the chat template changes message {number + 1} when more follow, so the "
                    "assistant's words cannot be located; choose another with --data.template"
                )
            parts = [(before[len(text) :], False), (after[len(before) :], True)]
            yield from (part for part in parts if part[0])
            text = after

    def _render(self, messages: list[dict[str, Any]], *, ask: bool) -> str:
        template = choose_template(self.template, self.tokenizer)
        try:
            return render(template, messages, self.tokenizer, add_generation_prompt=ask)
        except InputError as error:
            raise Broken(str(error)) from error

    @cached_property
    def _specials(self) -> frozenset[int]:
        added = self.tokenizer.backend.get_added_tokens_decoder()
        special = {token for token, content in added.items() if content.special}
        return frozenset(special | set(self.tokenizer.eos))

    def _weights(self, tokens: list[int]) -> list[float]:
        """Give loss to the words and the end of the turn, not to blanks after it, which no model
        generates."""
        last = max((i for i, token in enumerate(tokens) if token in self._specials), default=-1)
        ends = last >= 0 and not self.tokenizer.decode(tokens[last + 1 :]).strip()
        count = last + 1 if ends else len(tokens)
        return [1.0] * count + [0.0] * (len(tokens) - count)


def encode_continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a rendered text that follows another, without the space that some
    tokenizers put before every text."""
    encode = tokenizer.encode_controlled
    for anchor in _ANCHORS:
        before, both = encode(anchor), encode(anchor + text)
        if both[: len(before)] == before:
            return both[len(before) :]
    return encode(text)
