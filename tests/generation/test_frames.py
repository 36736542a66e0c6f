"""Check frames against forward passes over their whole text: allowed ids, guidance, batches."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from tiny_vision_model import CONFIG, VISION, following, ids, weights

from lwm.core.errors import CapacityError, ConfigError, InputError
from lwm.engine.engine import Engine
from lwm.engine.request import Request
from lwm.engine.sampling import Sampling
from lwm.generation.frames import FrameRequest, generate_frames
from lwm.generation.vision_prompts import frame_tokens

GREEDY = Sampling(temperature=0)
PROMPT, OTHER = ids("a red apple<vision>"), ids("<s><vision>")
CODES = range(CONFIG.vocab_size, CONFIG.vocab_size + VISION.codes)
END, LAST = CODES.stop, CODES.stop + 1


@cache
def engine() -> Engine:
    return Engine(weights(), CONFIG, slots=4, tokens=256)


def generate(**changes: Any) -> np.ndarray:
    settings: dict[str, Any] = {"prompt": PROMPT, "unconditional": OTHER, "sampling": GREEDY}
    wanted = FrameRequest(**{**settings, **changes})
    return generate_frames(lambda *needs: engine(), CONFIG, wanted)


def test_frames_have_end_tokens() -> None:
    codes = np.array([[1, 2, 3, 4], [5, 6, 7, 19]])
    low = CONFIG.vocab_size
    expected = [low + n for n in (1, 2, 3, 4, 20, 5, 6, 7, 19, 21)]
    assert frame_tokens(codes, CONFIG) == expected
    assert frame_tokens(codes, CONFIG, ended=False) == [*expected[:-1], low + 20]


def allowed(frames: int) -> Any:
    (request,) = FrameRequest(prompt=PROMPT, unconditional=OTHER, frames=frames).requests(CONFIG)
    return request.allowed


def test_codes_come_in_a_frame_and_its_end_after_it() -> None:
    assert [allowed(2)(n) for n in range(10)] == [
        *[CODES] * 4, range(END, END + 1), *[CODES] * 4, range(LAST, LAST + 1),
    ]  # fmt: skip


def test_greedy_frames_are_the_likeliest_codes_of_the_whole_text() -> None:
    codes = generate(frames=3)
    assert codes.shape == (1, 3, 4)
    text = frame_tokens(codes[0], CONFIG)
    logits = following(PROMPT, text)[:, CODES.start : CODES.stop]
    generated = [n for n in range(len(text)) if n % 5 != 4]
    assert (CONFIG.vocab_size + logits.argmax(axis=1))[generated].tolist() == np.array(text)[
        generated
    ].tolist()


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_mixes_two_forward_passes(scale: float) -> None:
    codes = generate(frames=2, sampling=Sampling(temperature=0, guidance=scale))
    text = frame_tokens(codes[0], CONFIG)
    wanted, unwanted = (following(start, text) for start in (PROMPT, OTHER))
    mixed = (unwanted + scale * (wanted - unwanted))[:, CODES.start : CODES.stop]
    for place, token in enumerate(text):
        if place % 5 != 4:
            assert token == CONFIG.vocab_size + mixed[place].argmax()
    alone = {0.0: OTHER, 1.0: PROMPT}.get(scale)
    if alone is not None:
        np.testing.assert_array_equal(codes, generate(prompt=alone, frames=2))


def test_a_batch_gives_the_frames_of_single_requests() -> None:
    for guidance in (1.0, 2.0):
        how = {"temperature": 1.3, "top_k": 9, "guidance": guidance}
        together = generate(count=3, frames=2, sampling=Sampling(**how, seed=7))
        assert together.shape == (3, 2, 4)
        assert ((together >= 0) & (together < VISION.codes)).all()
        for i in range(3):
            alone = generate(frames=2, sampling=Sampling(**how, seed=7 + i))
            np.testing.assert_array_equal(together[i], alone[0])
        assert len({codes.tobytes() for codes in together}) == 3


def test_frames_continue_earlier_ones() -> None:
    whole = generate(frames=3)
    np.testing.assert_array_equal(generate(frames=2, before=whole[:, :1]), whole[:, 1:])
    guided = Sampling(temperature=0, guidance=2.0)
    whole = generate(frames=3, sampling=guided)
    after = generate(frames=1, count=2, before=whole[:, :2], sampling=guided)
    np.testing.assert_array_equal(after, np.repeat(whole[:, 2:], 2, axis=0))


def test_every_frame_is_reported_once() -> None:
    done: dict[tuple[int, int], np.ndarray] = {}

    def frame_done(video: int, frame: int, codes: np.ndarray) -> None:
        assert (video, frame) not in done
        done[video, frame] = codes

    wanted = FrameRequest(
        prompt=PROMPT, unconditional=OTHER, count=2, frames=3,
        sampling=Sampling(temperature=1.0, guidance=2.0),
    )  # fmt: skip
    codes = generate_frames(lambda *needs: engine(), CONFIG, wanted, frame_done=frame_done)
    assert len(done) == 6
    for (video, frame), expected in done.items():
        np.testing.assert_array_equal(expected, codes[video, frame])


def test_a_callback_can_stop_the_generation() -> None:
    def enough(video: int, frame: int, codes: np.ndarray) -> None:
        raise KeyboardInterrupt

    wanted = FrameRequest(
        prompt=PROMPT, unconditional=OTHER, count=2, frames=3, sampling=Sampling(guidance=2.0)
    )
    with pytest.raises(KeyboardInterrupt):
        generate_frames(lambda *needs: engine(), CONFIG, wanted, frame_done=enough)
    assert engine().scheduler.idle


def test_a_conversation_never_takes_an_id_of_vision() -> None:
    """Check a prompt after which vision ids are likeliest, beside frames being generated."""
    request = Request(prompt=PROMPT, max_tokens=12, sampling=GREEDY, logprobs=20)
    numbers = [engine().submit(request)]
    wanted = FrameRequest(prompt=PROMPT, unconditional=OTHER, sampling=GREEDY)
    generate_frames(lambda *needs: engine(), CONFIG, wanted)
    events = list(engine().follow(numbers))
    answer = [event.token or 0 for event in events]
    logits = following(PROMPT, answer)
    assert (logits.argmax(axis=1) >= CONFIG.vocab_size).any()
    assert answer == logits[:, : CONFIG.vocab_size].argmax(axis=1).tolist()
    for event in events:
        assert all(token < CONFIG.vocab_size for token, _ in event.top)
        assert len(event.top) == 20
    sampled = Request(prompt=PROMPT, max_tokens=60, sampling=Sampling(temperature=9.0))
    assert all((e.token or 0) < CONFIG.vocab_size for e in engine().stream(sampled))


def test_alternatives_of_a_code_are_codes() -> None:
    request = Request(
        prompt=PROMPT, max_tokens=5, sampling=GREEDY, logprobs=20,
        allowed=allowed(1),
    )  # fmt: skip
    events = list(engine().stream(request))
    assert [len(event.top) for event in events] == [20, 20, 20, 20, 1]
    assert events[-1].token == LAST
    assert events[-1].top == ((LAST, 0.0),)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"frames": 0}, ConfigError, "frames is 0"),
        ({"count": 0}, ConfigError, "count is 0"),
        ({"frames": 60}, CapacityError, r"60 frames of 5 tokens.*19.*318.*256.*at most 47"),
        ({"before": np.zeros((1, 1, 3), np.int32)}, InputError, r"shape \[1, 3\].*frame of 4"),
        ({"before": np.full((1, 1, 4), 20)}, InputError, "20 to 20.*0 to 19"),
        ({"before": np.full((2, 1, 4), 1), "count": 3}, InputError, "2 videos.*3 are to be"),
    ],
)
def test_bad_frame_requests_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        generate(**changes)
    assert engine().scheduler.idle
    fitting = FrameRequest(prompt=PROMPT, unconditional=OTHER, frames=47, sampling=GREEDY)
    assert sum(fitting.length(VISION)) <= CONFIG.max_sequence_length
