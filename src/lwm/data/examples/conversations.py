"""Chat messages -> examples in which the assistant's words alone are learnt.

Where the assistant's words lie is found for any template by rendering the conversation step by
step: up to where the assistant is to speak, then with what it said. Each stretch is tokenised on
its own, so that no token reaches over the boundary, and as it would be inside the whole text, so
that the tokens are those a chat will see.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lwm.core.errors import InputError
from lwm.data.examples.examples import Broken, Example
from lwm.data.examples.fields import encode_text, json_type, require_key
from lwm.data.text.templates import choose_template, render
from lwm.data.text.tokenizer import Tokenizer

_ANCHORS = ("\n", ":", ".")  # one of them never melts into what follows


@dataclass(frozen=True)
class _Stretch:
    text: str
    learnt: bool


@dataclass(frozen=True, kw_only=True)
class ConversationEncoder:
    """Turns a record that has messages into an example.

    Args:
        key: of the list of messages.
        template: `auto` or the name of a template.

    Raises:
        ConfigError: no template has this name.
    """

    tokenizer: Tokenizer
    key: str
    template: str = "auto"

    def __post_init__(self) -> None:
        choose_template(self.template, self.tokenizer)

    def __call__(
        self, record: Mapping[str, Any], line: int, *, drop_prompt: bool = False
    ) -> Example | None:
        """The example, or None where there are no messages.

        Raises:
            Broken: the messages are malformed, or the template does not write them in order.
        """
        del line, drop_prompt  # a chat teaches text
        messages = require_key(record, self.key)
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise Broken(
                f"the key {self.key!r} holds {json_type(messages)}, where a list of messages is "
                "needed"
            )
        if not messages:
            return None
        tokens: list[int] = []
        weights: list[float] = []
        for stretch in self._stretches(messages):
            # After a special token a text begins anew, as it does at the start.
            begins = not tokens or tokens[-1] in self._specials
            if begins:
                encoded = encode_text(self.tokenizer, stretch.text)
            else:
                encoded = encode_continuation(self.tokenizer, stretch.text)
            tokens += encoded
            weights += self._weights(encoded) if stretch.learnt else [0.0] * len(encoded)
        return Example.of_text(tokens, weights)

    def _stretches(self, messages: list[dict[str, Any]]) -> list[_Stretch]:
        """The text of the conversation, cut where the assistant begins and ends."""
        stretches, text = [], ""
        whole = self._render(messages, ask=False)
        for number, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            if not number:
                raise Broken("its first message is the assistant's; nothing asks for it")
            before = self._render(messages[:number], ask=True)
            after = self._render(messages[: number + 1], ask=False)
            in_order = before.startswith(text) and after.startswith(before)
            if not in_order or not whole.startswith(after):
                raise Broken(
                    f"the chat template writes message {number + 1} otherwise once the "
                    "conversation goes on, so what the assistant said cannot be told from the "
                    "rest; choose another with --data.template"
                )
            stretches += [
                _Stretch(before[len(text) :], learnt=False),
                _Stretch(after[len(before) :], learnt=True),
            ]
            text = after
        return [stretch for stretch in stretches if stretch.text]

    def _render(self, messages: list[dict[str, Any]], *, ask: bool) -> str:
        try:
            return render(
                choose_template(self.template, self.tokenizer),
                messages,
                self.tokenizer,
                add_generation_prompt=ask,
            )
        except InputError as error:
            raise Broken(str(error)) from error

    @cached_property
    def _specials(self) -> frozenset[int]:
        added = self.tokenizer.backend.get_added_tokens_decoder()
        return frozenset(token for token, its in added.items() if its.special) | frozenset(
            self.tokenizer.eos
        )

    def _weights(self, tokens: list[int]) -> list[float]:
        """Loss on the words and on what ends the turn; none on blanks that a template puts after
        that, which no model is asked to write."""
        last = max((i for i, token in enumerate(tokens) if token in self._specials), default=-1)
        ends = last >= 0 and not self.tokenizer.decode(tokens[last + 1 :]).strip()
        learnt = last + 1 if ends else len(tokens)
        return [1.0] * learnt + [0.0] * (len(tokens) - learnt)


def encode_continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text that follows another, without the space that some tokenizers put before
    every text.

    Raises:
        Broken: the text is no proper Unicode.
    """
    plain = encode_text(tokenizer, text)
    for anchor in _ANCHORS:
        before = encode_text(tokenizer, anchor)
        both = encode_text(tokenizer, anchor + text)
        if both[: len(before)] == before:
            return both[len(before) :]
    return plain
