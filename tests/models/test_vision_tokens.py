"""Check the vision vocabulary's frames with end tokens against a plain loop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from lwm.core.errors import ConfigError, InputError
from lwm.models.vision_tokens import VisionVocabulary, single_table_ids

VISION = VisionVocabulary(codes=16, codes_per_frame=4, size=24)


def ids_by_loop(videos: np.ndarray, vision: VisionVocabulary, *, ended: bool) -> list[int]:
    ids = []
    for number, frame in enumerate(videos.tolist(), 1):
        last = ended and number == len(videos)
        ids += [*frame, vision.end_of_video if last else vision.end_of_frame]
    return ids


@given(some.integers(1, 5), some.integers(1, 6), some.integers(1, 20), some.integers(0, 2**32 - 1))
def test_interleaved_frames_equal_a_loop_and_split_again(
    frames: int, per_frame: int, entries: int, seed: int
) -> None:
    vision = VisionVocabulary(codes=entries, codes_per_frame=per_frame, size=entries + 2)
    codes = np.random.default_rng(seed).integers(0, entries, (frames, per_frame))
    ids = vision.interleave(codes)
    assert ids.dtype == np.int32
    assert ids.tolist() == ids_by_loop(codes, vision, ended=True)
    assert vision.interleave(codes, ended=False).tolist() == ids_by_loop(
        codes, vision, ended=False
    )
    np.testing.assert_array_equal(vision.split(ids), codes)
    for place, token in enumerate(ids.tolist()):
        valid = vision.ids_at(place, frames)
        assert token in valid
        assert len(valid) == (entries if token < entries else 1)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "0 vision ids are not a multiple of 5"),
        ([1, 2, 3, 4, 16, 1], "6 vision ids are not a multiple of 5"),
        ([1, 2, 3, 16, 17], "below 16"),
        ([1, 2, 3, -1, 17], "below 16"),
        ([1, 2, 3, 4, 16], "the last by 17"),
        ([1, 2, 3, 4, 17, 1, 2, 3, 4, 17], "each followed by 16"),
    ],
)
def test_ids_that_are_not_whole_frames_are_refused(ids: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VISION.split(np.array(ids, np.int32))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((0, 4), int), r"shape \[0, 4\]"),
        (np.zeros((1, 5), int), r"shape \[1, 5\].*frame of 4"),
        (np.full((1, 4), 16), "16 to 16.*0 to 15"),
        (np.full((1, 4), -1), "-1 to -1.*0 to 15"),
    ],
)
def test_codes_of_another_vqgan_are_refused(codes: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        VISION.interleave(codes)


def test_ids_of_two_tables_become_ids_of_one() -> None:
    tokens, mask = np.array([[5, 5, 0]]), np.array([[False, True, True]])
    assert single_table_ids(tokens, mask, 32).tolist() == [[5, 37, 32]]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"codes": 0}, "vision.codes is 0; it must be at least 1"),
        ({"codes_per_frame": 0}, "vision.codes_per_frame is 0; it must be at least 1"),
        ({"codes": 8, "size": 9}, "vision.size is 9; 8 codes and two end tokens need at least 10"),
    ],
)
def test_impossible_vocabularies_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VisionVocabulary(**sizes)
