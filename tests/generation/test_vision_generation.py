"""A model that sees, from words to pixels and from pictures to words."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_model
from tiny_vision_model import CONFIG, VISION, following, ids, model, tokenizer

from lwm.core.errors import CapacityError, ConfigError, InputError
from lwm.engine.sampling import Sampling
from lwm.generation.codec import decode_frames
from lwm.generation.frames import IMAGE, VIDEO, FrameRequest, frame_tokens, generate_frames
from lwm.generation.model import Model
from lwm.generation.vision_generation import video_codes


class Shades:
    """Pictures of two by two pixels, each the shade of its code."""

    config = SimpleNamespace(image_size=2)

    def encode(self, pixels: Any, /) -> Any:
        return np.rint((pixels[..., 0] + 1) * 127.5 / 10).astype(int)

    def decode(self, codes: Any, /) -> Any:
        return np.repeat(np.asarray(codes)[..., None] * 10 / 127.5 - 1, 3, axis=-1)


@pytest.fixture(scope="module")
def world() -> Model:
    made = model()
    made.codec = Shades()
    return made


def test_pictures_are_what_the_codec_makes_of_the_codes(world: Model) -> None:
    told: list[np.ndarray] = []
    drawn = world.image(
        "an apple", count=2, seed=3, frame_done=lambda picture, frame, codes: told.append(codes)
    )
    assert (drawn.shape, drawn.dtype) == ((2, 2, 2, 3), np.uint8)
    assert sorted(x.reshape(4).tolist() for x in np.rint(drawn[..., 0] / 10).astype(int)) == (
        sorted(codes.tolist() for codes in told)
    )
    np.testing.assert_array_equal(drawn, world.image("an apple", count=2, seed=3))
    assert not np.array_equal(drawn, world.image("an apple", count=2, seed=4))
    assert not np.array_equal(
        drawn, world.image("an apple", count=2, seed=3, negative_prompt="a pear")
    )


def test_a_video_begins_with_a_picture_and_goes_on_under_its_own_prompt(world: Model) -> None:
    told: list[tuple[int, int]] = []
    codes = video_codes(
        world.engine_for, CONFIG, tokenizer(), "an apple", frames=3, count=2,
        sampling=replace(VIDEO, temperature=0), first_sampling=replace(IMAGE, temperature=0),
        frame_done=lambda video, frame, codes: told.append((video, frame)),
    )  # fmt: skip
    assert codes.shape == (2, 3, 4)
    assert sorted(told) == [(video, frame) for video in range(2) for frame in range(3)]
    start = "<s>You are a helpful assistant. USER: Generate {} of an apple ASSISTANT:"
    image, video = (ids(start.format(kind)) + ids("<vision>") for kind in ("an image", "a video"))
    text = frame_tokens(codes[0], CONFIG)
    allowed = slice(CONFIG.vocab_size, CONFIG.vocab_size + VISION.codes)
    wanted, unwanted = (following(p, text[:4])[:, allowed] for p in (image, ids("<s><vision>")))
    mixed = unwanted + IMAGE.guidance * (wanted - unwanted)
    assert mixed.argmax(axis=1).tolist() == codes[0, 0].tolist()
    later = following(video, text)[:, allowed].argmax(axis=1)
    assert later[5:9].tolist() == codes[0, 1].tolist()
    assert later[10:14].tolist() == codes[0, 2].tolist()
    # From earlier frames alone, the rest is the same; and so it is in pixels.
    rest = world.video("an apple", frames=3, count=2, before=codes[:, :1], temperature=0)
    assert rest.shape == (2, 3, 2, 2, 3)
    np.testing.assert_array_equal(rest, decode_frames(Shades(), codes))


def test_settings_count_for_the_first_frame_too(world: Model) -> None:
    how: dict[str, Any] = {"temperature": 0.0, "guidance": 2.0}
    video = world.video("an apple", frames=2, **how)
    np.testing.assert_array_equal(video[0], world.image("an apple", **how))
    assert not np.array_equal(video[0], world.image("an apple", temperature=0.0))


def test_a_video_of_one_frame_is_a_picture(world: Model) -> None:
    video = world.video("an apple", frames=1, seed=5)
    np.testing.assert_array_equal(video[0], world.image("an apple", seed=5))


def test_a_chat_about_a_picture_answers_in_text(world: Model) -> None:
    codes = [[1, 2, 3, 4]]
    parts = [{"type": "text", "text": "What?"}, {"type": "codes", "codes": codes}]
    answer = world.chat([{"role": "user", "content": parts}], max_tokens=6)
    prompt = [
        *ids("<s>You are a helpful assistant. USER: What?\n"), *ids("<vision>"),
        *frame_tokens(np.array(codes), CONFIG), *ids("</vision>"), *ids(" ASSISTANT:"),
    ]  # fmt: skip
    tokens: list[int] = []
    for _ in range(6):
        logits = following(prompt, [*tokens, 0])[-1]
        tokens.append(int(logits[: CONFIG.vocab_size].argmax()))
        if tokens[-1] == 1:
            break
    assert answer == tokenizer().decode(tokens)


def test_a_video_too_long_is_refused_before_its_first_frame(world: Model) -> None:
    with pytest.raises(CapacityError, match=r"60 frames of 5 tokens.*context is 256"):
        world.video("an apple", frames=60, frame_done=lambda *frame: pytest.fail("drawn"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": " "}, InputError, "prompt is empty"),
        ({"prompt": "a", "frames": 0}, InputError, "frames is 0"),
        ({"prompt": "a", "frames": 2, "before": np.zeros((1, 2, 4), int)}, InputError, "least 3"),
        ({"prompt": "a", "before": [[1, 2, 3, 4]]}, InputError, r"shape \[1, 4\] and type int64"),
        ({"prompt": "a", "before": [[[1], [1, 2]]]}, InputError, r"shape \[0\]"),
        ({"prompt": "a", "colour": 1}, ConfigError, "colour"),
        ({"prompt": "a", "temperature": -1}, ConfigError, "temperature is -1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    world: Model, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        world.video(**arguments)


def test_pixels_are_rounded_as_images_are() -> None:
    """Check codes whose pixels lie between two levels."""
    levels = np.arange(16).reshape(1, 1, 16)

    class Between(Shades):
        def decode(self, codes: Any, /) -> Any:
            return (np.repeat(codes[..., None], 3, axis=-1) + 0.6) / 127.5 - 1

    expected = np.repeat(np.arange(1, 17).reshape(1, 1, 4, 4, 1), 3, axis=-1)
    np.testing.assert_array_equal(decode_frames(Between(), levels), expected)


def test_a_model_that_cannot_draw_says_why(world: Model) -> None:
    blind = Model(
        source="tiny", config=tiny_model.CONFIG, weights=tiny_model.fused(),
        open_tokenizer=tokenizer, dtype="float32", mesh=None,
    )  # fmt: skip
    with pytest.raises(InputError, match="text model"):
        blind.image("an apple")
    with pytest.raises(InputError, match="'codes' and tiny reads text only"):
        blind.chat([{"role": "user", "content": [{"type": "codes", "codes": [[1]]}]}])
    with pytest.raises(ConfigError, match="tiny-vision-model has no VQGAN"):
        model().image("an apple")
    wanted = FrameRequest(prompt=[1], unconditional=[1], sampling=Sampling())
    with pytest.raises(InputError, match="text model"):
        generate_frames(lambda *needs: pytest.fail("made"), tiny_model.CONFIG, wanted)
    with pytest.raises(ConfigError, match="3 codes, which are not a square"):
        decode_frames(Shades(), np.zeros((1, 1, 3), int))
