"""Check drafts against a plain search, and how right and wrong drafts change the next ones."""

from collections.abc import Sequence

import hypothesis.strategies as st
from hypothesis import given

from lwm.engine.drafting import LONGEST, LONGEST_PAUSE, Drafter, DraftSettings

LONG = DraftSettings(widths=(10,))


def searched(text: Sequence[int], count: int) -> list[int]:
    """Return what followed the latest earlier place with the longest shared end."""
    for size in range(LONGEST, DraftSettings().shortest - 1, -1):
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
    drafter = Drafter(prompt, sum(map(len, later)), LONG)
    assert drafter.draft(count) == searched(text, count)
    for tokens in later:
        drafter.record(tokens)
        text += tokens
        assert drafter.draft(count) == searched(text, count)


def test_the_longest_shared_end_is_preferred_and_then_the_latest() -> None:
    def draft(text: list[int], limit: int, shortest: int = 3) -> list[int]:
        return Drafter(text, 0, DraftSettings(shortest=shortest)).draft(limit)

    end = [1, 2, 3, 4, 5]
    text = [9, *end, 6, 7, *end, 8, 0, 0, *end[1:], 9, 9, *end]
    assert draft(text, 1) == [8]
    assert draft([*text[:14], 0, *end[1:]], 1) == [8]
    assert draft([0, *end[1:], 9, 9, *end[2:]], 2) == [9, 9]
    assert draft([*end, 6, *end[3:]], 2) == []
    assert draft([9, *end[2:], 8, 7, *end[2:]], 1, shortest=3) == [8]
    assert draft([9, *end[2:], 8, 7, *end[2:]], 1, shortest=4) == []


def test_a_draft_never_exceeds_the_text() -> None:
    assert Drafter([7] * 4, 0).draft(5) == [7]
    assert Drafter([1, 2, 3, 1, 2, 3], 0, LONG).draft(9) == [1, 2, 3]


def test_right_drafts_grow_and_wrong_ones_pause() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]
    drafter = Drafter(text, 500, DraftSettings(widths=(3, 7)))

    def judge(drafted: int, accepted: int) -> None:
        drafter.record(([0] * 20 + text)[-(accepted + 1) :], drafted)
        drafter.record(text)

    assert len(drafter.draft(9)) == 2
    judge(2, 2)
    assert len(drafter.draft(9)) == 6
    judge(6, 3)
    assert len(drafter.draft(9)) == 2
    pauses = []
    for _ in range(7):
        judge(2, 0)
        pauses.append(0)
        while not drafter.draft(9):
            pauses[-1] += 1
    assert pauses == [1, 2, 4, 8, 16, 16, 16]
    assert max(pauses) == LONGEST_PAUSE
    judge(2, 1)
    assert len(drafter.draft(9)) == 2
    judge(2, 0)
    assert drafter.draft(9) == []
    assert len(drafter.draft(9)) == 2
