"""Render conversations as text by Jinja chat templates.

Templates run in a sandbox, because a checkpoint's template is a program from elsewhere.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from importlib.resources import files
from itertools import count
from textwrap import shorten
from typing import Any, NoReturn

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lwm.core.errors import ConfigError, InputError
from lwm.data.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""OpenAI's format: `{"role": "system" | "user" | "assistant", "content": text}`, where the content
may be a list of parts `{"type": "text", "text": text}`."""

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
        role, text = message.get("role"), text_content(message.get("content"))
        if role not in ("system", "user", "assistant") or text is None:
            shown = shorten(repr(dict(message)), 100, placeholder="...")
            raise InputError(
                f"the message {shown} is malformed; it needs a role (system, user or assistant) "
                "and a content that is text or a list of text parts"
            )
        plain.append(_escaped({**message, "content": text}, tokenizer))

    try:
        return _compiled(template).render(
            messages=plain,
            add_generation_prompt=add_generation_prompt,
            bos_token=tokenizer.bos or "",
            eos_token=tokenizer.eos_text,
        )
    except InputError:
        raise
    except Exception as error:  # a foreign program can fail in any way
        reason = " ".join(str(error).split())
        raise InputError(
            f"the chat template cannot be rendered ({reason}); choose another with --template"
        ) from error


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
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
