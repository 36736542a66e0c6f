"""The drafter against a search that is plainly written, and its manners after right and wrong
drafts."""

from collections.abc import Sequence

import hypothesis.strategies as st
from hypothesis import given

from lwm.engine.drafting import LONGEST, LONGEST_PAUSE, SHORTEST, Drafter


def searched(text: Sequence[int], count: int) -> list[int]:
    """What followed the latest earlier place that ends as the text does, the longest end first."""
    for size in range(LONGEST, SHORTEST - 1, -1):
        for start in range(len(text) - size - 1, -1, -1):
            if list(text[start : start + size]) == list(text[len(text) - size :]):
                return list(text[start + size : start + size + count])
    return []


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=30),
    st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=5),
    st.integers(0, 9),
)
def test_a_draft_is_what_followed_the_same_tokens_last(
    prompt: list[int], later: list[list[int]], count: int
) -> None:
    text = list(prompt)
    drafter = Drafter(prompt, sum(map(len, later)))
    assert drafter.draft(count, 0) == searched(text, count)
    for tokens in later:
        drafter.extend(tokens)
        text += tokens
        assert drafter.draft(count, 0) == searched(text, count)


def test_the_longest_shared_end_is_preferred_and_then_the_latest() -> None:
    end = [1, 2, 3, 4, 5]
    text = [9, *end, 6, 7, *end, 8, 0, 0, *end[1:], 9, 9, *end]
    assert Drafter(text, 0).draft(1, 1) == [8]
    assert Drafter([*text[:14], 0, *end[1:]], 0).draft(1, 1) == [8]
    assert Drafter([0, *end[1:], 9, 9, *end[2:]], 0).draft(2, 2) == [9, 9]
    assert Drafter([*end, 6, *end[3:]], 0).draft(2, 2) == []
    assert Drafter([9, *end[2:], 8, 7, *end[2:]], 0, shortest=3).draft(1, 1) == [8]
    assert Drafter([9, *end[2:], 8, 7, *end[2:]], 0, shortest=4).draft(1, 1) == []


def test_a_draft_never_reaches_beyond_the_text() -> None:
    assert Drafter([7] * 4, 0).draft(5, 5) == [7]
    assert Drafter([1, 2, 3, 1, 2, 3], 0).draft(9, 9) == [1, 2, 3]


def test_right_drafts_grow_and_wrong_ones_bring_silence() -> None:
    drafter = Drafter([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3], 100)
    assert len(drafter.draft(2, 6)) == 2
    drafter.judge(2, 2)
    assert len(drafter.draft(2, 6)) == 6
    drafter.judge(6, 3)
    assert len(drafter.draft(2, 6)) == 2
    pauses = []
    for _ in range(7):
        drafter.judge(2, 0)
        pauses.append(0)
        while not drafter.draft(2, 6):
            pauses[-1] += 1
    assert pauses == [1, 2, 4, 8, 16, 16, 16]
    assert max(pauses) == LONGEST_PAUSE
    drafter.judge(2, 1)
    assert len(drafter.draft(2, 6)) == 2
    drafter.judge(2, 0)
    assert drafter.draft(2, 6) == []
    assert len(drafter.draft(2, 6)) == 2
