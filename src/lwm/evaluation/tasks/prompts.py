"""A long context between the words that ask about it, as token ids.

The context comes as ids already, so that its length is exact; the words before and behind it are
written by a chat template and encoded by themselves.
"""

from lwm.core.errors import InputError
from lwm.data.text.templates import choose_template, render, unused_text
from lwm.data.text.tokenizer import Tokenizer


def wrap(
    tokenizer: Tokenizer, template: str, before: str, after: str, answer_prefix: str = ""
) -> tuple[list[int], list[int]]:
    """Ids that stand before a context, and ids that stand behind it.

    Args:
        template: `auto`, `original`, `chatml`, or `none` for the words alone.
        before, after: the user's words round the context.
        answer_prefix: words the answer begins with.

    Raises:
        ConfigError: there is no such template.
        InputError: the template does not write what the user says.
    """
    if template == "none":
        bos = tokenizer.bos or ""
        head, tail = bos + before, after
    else:
        marker = unused_text(before + after + answer_prefix)
        message = {"role": "user", "content": before + marker + after}
        text = render(choose_template(template, tokenizer), [message], tokenizer)
        if text.count(marker) != 1:
            raise InputError(
                "the chat template does not write what the user says; choose another with "
                "--template"
            )
        head, tail = text.split(marker)
    if answer_prefix and not tail[-1:].isspace() and not answer_prefix[0].isspace():
        tail += " "
    return tokenizer.encode_part(head), tokenizer.encode_part(tail + answer_prefix)
