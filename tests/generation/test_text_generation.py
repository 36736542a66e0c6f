"""Check stop strings in a stream of pieces against `str.find` on the whole text."""

from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from lwm.core.errors import InputError
from lwm.generation.text_generation import AnswerEnd, until_stop

letters = st.text("ab", max_size=6)


@settings(max_examples=500)
@given(st.lists(letters, max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
# The shorter one is complete while the longer one, which begins before it, is not.
@example(["aba", "b"], ["abab", "ba"])
@example(["aba"], ["abab", "ba"])
def test_the_text_ends_where_the_first_stop_string_begins(
    pieces: list[str], stops: list[str]
) -> None:
    text = "".join(pieces)
    ends = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    assert "".join(until_stop(pieces, stops)) == text[: min(ends, default=None)]


@given(st.lists(letters, max_size=12), st.text("ab", min_size=1, max_size=5))
def test_text_is_buffered_only_while_it_may_begin_a_stop_string(
    pieces: list[str], stop: str
) -> None:
    yielded: list[str] = []
    read: list[str] = []

    def reading() -> Iterator[str]:
        for piece in pieces:
            read.append(piece)
            yield piece

    for piece in until_stop(reading(), [stop]):
        yielded.append(piece)
        buffered = "".join(read)[len("".join(yielded)) :]
        assert stop.startswith(buffered) or stop in "".join(read)
        assert piece


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        AnswerEnd(stop=["b", ""])
