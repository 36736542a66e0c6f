"""Write the text around a long context with a chat template, and encode answers that follow it.

The context is token ids already, so that its length is exact; the text before and after it is
encoded separately.
"""

from collections.abc import Sequence

from lwm.core.errors import InputError
from lwm.data.text.templates import choose_template, render, unused_text
from lwm.data.text.tokenizer import Tokenizer

_ANCHOR = 8  # characters before an answer that determine how its first token is encoded


def wrap(
    tokenizer: Tokenizer, template: str, before: str, after: str, answer_prefix: str = ""
) -> tuple[list[int], list[int]]:
    """Return the token ids before and after a context.

    Args:
        template: `auto`, `original`, `chatml`, or `none` for the text without a template.
        before, after: the user's text around the context.
        answer_prefix: beginning of the assistant's answer.

    Raises:
        ConfigError: there is no such template.
        InputError: the template leaves out the user's text.
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
                "the chat template does not write the user's text once; choose another with "
                "--template"
            )
        head, tail = text.split(marker)
    if answer_prefix and not tail[-1:].isspace() and not answer_prefix[0].isspace():
        tail += " "
    return tokenizer.encode_part(head), tokenizer.encode_part(tail + answer_prefix)


def continuation(
    tokenizer: Tokenizer, tail: Sequence[int], answer: str, separator: str = " "
) -> list[int]:
    """Encode an answer that follows a prompt.

    Args:
        tail: last tokens of the prompt.
        separator: precedes the answer if the prompt does not end in white space.
    """
    anchor = tokenizer.decode(tail)[-_ANCHOR:]
    if anchor and not anchor[-1].isspace():
        answer = separator + answer
    base = tokenizer.encode(anchor, specials=False)
    both = tokenizer.encode(anchor + answer, specials=False)
    if both[: len(base)] == base:
        return both[len(base) :]
    return tokenizer.encode(answer, specials=False)  # a token would span anchor and answer
