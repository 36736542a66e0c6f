"""Render conversations as text by Jinja chat templates.

Templates run in a sandbox, because a checkpoint's template is a program from elsewhere.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from importlib.resources import files
from itertools import count
from textwrap import shorten
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lwm.core.errors import ConfigError, InputError
from lwm.data.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""OpenAI's format: `{"role": "system" | "user" | "assistant", "content": text}`, where the content
may be a list of parts `{"type": "text", "text": text}`, or None for no text. A `developer` is a
system, and a `tool` gives the result of a call."""

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}
"""The roles that messages have, and the names that templates know for them."""

TEMPLATES = {
    name: files("lwm.data.text").joinpath(f"{name}.jinja").read_text(encoding="utf-8")
    for name in ("original", "chatml")
}
ORIGINAL, CHATML = TEMPLATES.values()
"""The original's prompts (LargeWorldModel/LWM), with later turns in the same format."""

TURN_ENDS = {"chatml": "<|im_end|>"}
"""Texts that end the assistant's turn, for models that were not trained with the template."""


def unused_text(text: str) -> str:
    """Return a placeholder that does not occur in a text."""
    return next(mark for n in count() if (mark := f"\ue000{n}\ue001") not in text)


def choose_template(name: str, tokenizer: Tokenizer) -> str:
    """Return a template by name; `auto` is the checkpoint's own, or else the original's."""
    if name == "auto":
        return tokenizer.chat_template or ORIGINAL
    if name not in TEMPLATES:
        raise ConfigError(
            f"there is no chat template {name!r}; choose auto, {' or '.join(TEMPLATES)}"
        )
    return TEMPLATES[name]


def text_content(content: Any) -> str | None:
    """Return the text of a message's content, a line for each part; None if it has other parts."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    if any(not isinstance(part, Mapping) or part.get("type") != "text" for part in content):
        return None
    texts = [part.get("text") for part in content]
    return "\n".join(texts) if all(isinstance(text, str) for text in texts) else None


def render(
    template: str,
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = True,
) -> str:
    """Render a conversation, by default up to where the assistant answers.

    The result is for `Tokenizer.encode_controlled` or `encode_part`: control tokens that messages
    spell are escaped in it.
    """
    if not messages:
        raise InputError("the conversation is empty; give at least one message")
    plain = []
    for message in messages:
        missing = None if message.get("tool_calls") else ...  # only calls stand without a content
        role, text = message.get("role"), text_content(message.get("content", missing))
        if not isinstance(role, str) or role not in _ROLES or text is None:
            shown = shorten(repr(dict(message)), 100, placeholder="...")
            raise InputError(
                f"the message {shown} is malformed; it needs a role (system, developer, user, "
                "assistant or tool) and a content that is text or a list of text parts"
            )
        changed = {**message, "role": _ROLES[role], "content": text}
        plain.append(_escaped(changed, tokenizer))
    result = _rendered(
        template, plain, tokenizer.named_tokens, add_generation_prompt=add_generation_prompt
    )
    for number, message in enumerate(plain, 1):
        # Templates may shorten the assistant's earlier answers, but nobody else's words.
        role = message["role"]
        if role != "assistant" and not _occurs(message["content"].strip(), result):
            raise InputError(
                f"the chat template leaves out message {number}, of the role {role!r}; move it "
                "(a system message comes first), or choose another template with --template"
            )
    return result


def _occurs(text: str, rendered: str) -> bool:
    """Return whether a text occurs in a rendered template, as it is or quoted."""
    quoted = (repr(text), json.dumps(text), json.dumps(text, ensure_ascii=False))
    return text in rendered or any(form[1:-1] in rendered for form in quoted)


def _rendered(
    template: str,
    messages: Sequence[Message],
    named_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool,
) -> str:
    try:
        return _compiled(template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **named_tokens,
        )
    except InputError:
        raise
    except Exception as error:  # a foreign program can fail in any way
        reason = " ".join(str(error).split())
        raise InputError(
            f"the chat template cannot be rendered ({reason}); choose another with --template"
        ) from error


def with_turn_end(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """Return the tokenizer with the control token that ends the assistant's turn in a template,
    besides the tokens that end an answer by its own settings."""
    answer = unused_text(template)
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        text = _rendered(template, messages, tokenizer.named_tokens, add_generation_prompt=False)
    except InputError:  # it may need other messages
        return tokenizer
    ids = tokenizer.encode_controlled(text.rpartition(answer)[2].lstrip())
    added = tokenizer.backend.get_added_tokens_decoder()
    if not ids or ids[0] not in added or ids[0] in tokenizer.eos:
        return tokenizer
    return replace(tokenizer, eos=(*tokenizer.eos, ids[0]))


def _escaped(value: Any, tokenizer: Tokenizer) -> Any:
    """Escape all texts in a message."""
    if isinstance(value, str):
        return tokenizer.escape(value)
    if isinstance(value, Mapping):
        return {key: _escaped(item, tokenizer) for key, item in value.items()}
    return [_escaped(item, tokenizer) for item in value] if isinstance(value, list) else value


@lru_cache(maxsize=8)  # training renders one template millions of times
def _compiled(template: str) -> Template:
    def refuse(reason: str) -> NoReturn:
        sentence = " ".join(str(reason).split())
        raise InputError(f"the model's chat template refuses the conversation: {sentence}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML; these are transformers' arguments.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Generation(Extension):
    """Accept `{% generation %}` blocks, by which transformers finds the assistant's words."""

    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()
