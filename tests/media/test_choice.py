"""Check the choice of frames against slow, direct implementations of its definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm.core.errors import InputError
from lwm.media.choice import Timeline, check_choice, choose_frames


def even(count: int, rate: int = 25) -> Timeline:
    return Timeline(times=[index / rate for index in range(count)], end=count / rate)


@given(st.integers(1, 500), st.integers(1, 500))
def test_even_spacing_equals_the_original(count: int, limit: int) -> None:
    taken = list(choose_frames(even(count), max_frames=limit))
    if count <= limit:
        assert taken == list(range(count))
    else:
        assert taken == np.linspace(0, count - 1, limit).astype(int).tolist()


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=40), st.sampled_from([0.5, 1.0, 4.0, 20.0])
)
def test_at_a_rate_each_time_gets_the_visible_frame(gaps: list[int], fps: float) -> None:
    # In milliseconds, with a duration for each frame. All times are multiples of ten, since
    # differences below one count as rounding.
    starts = np.cumsum([0, *gaps]) * 10
    timeline = Timeline(
        times=[start / 1000 + 7 for start in starts[:-1]], end=starts[-1] / 1000 + 7
    )
    expected, step = [], 0
    while step == 0 or step / fps < starts[-1] / 1000 - 1e-6:
        expected.append(
            max(
                index
                for index, start in enumerate(starts[:-1])
                if start / 1000 <= step / fps + 1e-6
            )
        )
        step += 1
    assert list(choose_frames(timeline, fps=fps)) == expected


def test_the_rate_of_the_video_takes_every_frame_once() -> None:
    # Ticks of 1/29.97 s in milliseconds, as containers round them.
    times = [round(index * 1001 / 30) / 1000 for index in range(300)]
    timeline = Timeline(times=times, end=10.01)
    taken = choose_frames(timeline, fps=30000 / 1001)
    assert len(taken) == 300
    assert len(set(taken)) == 300


def test_rate_and_limit_combine() -> None:
    taken = choose_frames(even(1000), fps=5.0, max_frames=7)
    at_rate = choose_frames(even(1000), fps=5.0)
    assert list(taken) == [at_rate[index] for index in np.linspace(0, 199, 7).astype(int)]


def test_an_impossible_duration_is_refused() -> None:
    timeline = Timeline(times=[0.0, 1e12], end=1e12)
    with pytest.raises(InputError, match="a length of 1000000000000 seconds"):
        choose_frames(timeline, fps=1.0)


@pytest.mark.parametrize(
    ("max_frames", "fps"), [(0, None), (-1, None), (None, 0.0), (None, float("nan")), (None, 1e9)]
)
def test_arguments_out_of_range_are_refused(max_frames: int | None, fps: float | None) -> None:
    with pytest.raises(InputError, match=r"(max_frames|fps) is .*; it must"):
        check_choice(max_frames, fps)
