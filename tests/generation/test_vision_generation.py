"""Check a vision-language model from words to pixels and from images to words."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_model
from tiny_vision_model import CONFIG, VISION, following, ids, model, tokenizer

from lwm.core.errors import CapacityError, ConfigError, InputError
from lwm.data.text.templates import ORIGINAL
from lwm.engine.sampling import Sampling
from lwm.generation.codec import decode_frames
from lwm.generation.frames import IMAGE, VIDEO, FrameRequest, generate_frames, video_codes
from lwm.generation.media_inputs import count_part_frames
from lwm.generation.model import Model
from lwm.generation.vision_prompts import chat_length, chat_tokens, frame_tokens
from lwm.media.videos import write_video


class Shades:
    """Convert codes to images of two by two pixels, each the shade of its code."""

    config = SimpleNamespace(image_size=2)

    def encode(self, pixels: Any, /) -> Any:
        return np.rint((pixels[..., 0] + 1) * 127.5 / 10).astype(int)

    def decode(self, codes: Any, /) -> Any:
        return np.repeat(np.asarray(codes)[..., None] * 10 / 127.5 - 1, 3, axis=-1)


@pytest.fixture(scope="module")
def vision_model() -> Model:
    made = model()
    made.codec = Shades()
    return made


def test_images_are_the_decoded_codes(vision_model: Model) -> None:
    done: list[np.ndarray] = []
    images = vision_model.image(
        "an apple", count=2, seed=3, frame_done=lambda image, frame, codes: done.append(codes)
    )
    assert (images.shape, images.dtype) == ((2, 2, 2, 3), np.uint8)
    assert sorted(x.reshape(4).tolist() for x in np.rint(images[..., 0] / 10).astype(int)) == (
        sorted(codes.tolist() for codes in done)
    )
    np.testing.assert_array_equal(images, vision_model.image("an apple", count=2, seed=3))
    assert not np.array_equal(images, vision_model.image("an apple", count=2, seed=4))
    assert not np.array_equal(
        images, vision_model.image("an apple", count=2, seed=3, negative_prompt="a pear")
    )


def test_a_video_starts_with_an_image_and_continues_with_the_prompt_of_a_video(
    vision_model: Model,
) -> None:
    done: list[tuple[int, int]] = []
    codes = video_codes(
        vision_model.engine_for, CONFIG, tokenizer(), "an apple", frames=3, count=2,
        sampling=replace(VIDEO, temperature=0), first_sampling=replace(IMAGE, temperature=0),
        frame_done=lambda video, frame, codes: done.append((video, frame)),
    )  # fmt: skip
    assert codes.shape == (2, 3, 4)
    assert sorted(done) == [(video, frame) for video in range(2) for frame in range(3)]
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
    # Continued from the first frame, the rest is the same, also in pixels.
    rest = vision_model.video("an apple", frames=3, count=2, before=codes[:, :1], temperature=0)
    assert rest.shape == (2, 3, 2, 2, 3)
    np.testing.assert_array_equal(rest, decode_frames(Shades(), codes))


def test_settings_apply_to_the_first_frame_too(vision_model: Model) -> None:
    settings: dict[str, Any] = {"temperature": 0.0, "guidance": 2.0}
    video = vision_model.video("an apple", frames=2, **settings)
    np.testing.assert_array_equal(video[0], vision_model.image("an apple", **settings))
    assert not np.array_equal(video[0], vision_model.image("an apple", temperature=0.0))


def test_a_model_may_set_its_own_guidance_and_min_p() -> None:
    plain, tuned = model(), model()
    assert tuned.config.vision is not None
    vision = replace(tuned.config.vision, guidance=1.5, min_p=0.2)
    assert vision == tuned.config.vision  # the ids are the same
    tuned.config = replace(tuned.config, vision=vision)
    plain.codec = tuned.codec = Shades()
    image = tuned.image("an apple", count=3)
    np.testing.assert_array_equal(image, plain.image("an apple", count=3, guidance=1.5, min_p=0.2))
    assert not np.array_equal(image, plain.image("an apple", count=3))
    asked = tuned.image("an apple", count=3, guidance=5.0, min_p=0.0)
    np.testing.assert_array_equal(asked, plain.image("an apple", count=3))
    # Frames after the first are not guided.
    codes = np.array([[[1, 2, 3, 4]]])
    later = tuned.video("an apple", frames=3, before=codes)
    np.testing.assert_array_equal(
        later, plain.video("an apple", frames=3, before=codes, min_p=0.2)
    )


def test_a_video_of_one_frame_is_an_image(vision_model: Model) -> None:
    video = vision_model.video("an apple", frames=1, seed=5)
    np.testing.assert_array_equal(video[0], vision_model.image("an apple", seed=5))


def test_a_chat_about_an_image_answers_in_text(vision_model: Model) -> None:
    codes = [[1, 2, 3, 4]]
    parts = [{"type": "text", "text": "What?"}, {"type": "codes", "codes": codes}]
    answer = vision_model.chat([{"role": "user", "content": parts}], max_tokens=6)
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


def test_a_video_too_long_is_refused_before_its_first_frame(vision_model: Model) -> None:
    with pytest.raises(CapacityError, match=r"60 frames of 5 tokens.*context is 256"):
        vision_model.video(
            "an apple", frames=60, frame_done=lambda *frame: pytest.fail("generated")
        )


class Untouched(Shades):
    """Fail the test if a frame is encoded."""

    def encode(self, pixels: Any, /) -> Any:
        pytest.fail("a frame is encoded")


def test_frames_beyond_the_context_are_counted_and_not_encoded(tmp_path: Path) -> None:
    made = model()
    made.codec = Untouched()
    pixels = np.zeros((2048, 2, 2, 3), np.uint8)
    write_video(tmp_path / "a.mp4", np.zeros((80, 16, 16, 3), np.uint8), fps=4.0)
    text = {"type": "text", "text": "What?"}
    around = len(ids("<s>You are a helpful assistant. USER: What?\n"))
    around += len(ids("<vision>")) + len(ids("</vision>")) + len(ids(" ASSISTANT:"))
    gap = len(ids("\n")) + len(ids("<vision>")) + len(ids("</vision>"))  # one more part
    image = {"type": "image", "image": pixels[0]}
    for parts, length in (
        ([{"type": "video", "video": pixels, "max_frames": 2048}], around + 2048 * 5),
        ([{"type": "video", "video": tmp_path / "a.mp4", "fps": 4}], around + 80 * 5),
        ([{"type": "codes", "codes": np.zeros((50, 4), int)}, image], around + 51 * 5 + gap),
        ([image] * 9, around + 9 * 5 + 8 * gap),
    ):
        messages = [{"role": "user", "content": [text, *parts]}]
        message = rf"has {length:,} tokens and .* is 256, .*; show fewer frames or images"
        for ask in (made.chat, made.require_room):
            with pytest.raises(CapacityError, match=message):
                ask(messages)
    # Settings are refused early, too.
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        made.chat([{"role": "user", "content": [text, image]}], max_tokens=0)
    earlier = {"type": "video", "video": tmp_path / "a.mp4", "fps": 4}
    with pytest.raises(InputError, match="frames is 8 and there are 80 already"):
        made.video("an apple", frames=8, before=earlier)
    with pytest.raises(CapacityError, match=r"90 frames of 5 tokens .* context is 256"):
        made.video("an apple", frames=90, before=earlier)


def test_the_length_counted_is_that_of_the_prompt() -> None:
    made = model()
    made.codec = Shades()
    video = {"type": "video", "video": np.zeros((3, 2, 2, 3), np.uint8)}
    parts = [{"type": "text", "text": "What?"}, video, {"type": "codes", "codes": [[1] * 4] * 2}]
    messages = [{"role": "user", "content": parts}]
    args = (ORIGINAL, messages, tokenizer(), CONFIG)
    assert chat_length(*args, count_part_frames) == len(chat_tokens(*args, made.codes))
    made.chat(messages, max_tokens=1)
    assert made.timings.prompt == chat_length(*args, count_part_frames)
    # A video is continued from a file as from its codes.
    rest = made.video("an apple", frames=4, before=video, temperature=0)
    codes = made.codes(video)[None]
    again = made.video("an apple", frames=4, before=codes, temperature=0)
    np.testing.assert_array_equal(rest, again)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": " "}, InputError, "prompt is empty"),
        ({"prompt": "a", "frames": 0}, InputError, "frames is 0"),
        ({"prompt": "a", "frames": 2, "before": np.zeros((1, 2, 4), int)}, InputError, "least 3"),
        ({"prompt": "a", "before": [[1, 2, 3, 4]]}, InputError, r"shape \[1, 4\] and type int64"),
        ({"prompt": "a", "before": [[[1], [1, 2]]]}, InputError, r"shape \[0\]"),
        ({"prompt": "a", "tint": 1}, ConfigError, "tint"),
        ({"prompt": "a", "temperature": -1}, ConfigError, "temperature is -1"),
    ],
)
def test_bad_video_requests_are_refused(
    vision_model: Model, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        vision_model.video(**arguments)


def test_pixels_are_rounded_as_images_are() -> None:
    """Check codes whose pixels lie between two levels."""
    levels = np.arange(16).reshape(1, 1, 16)

    class Between(Shades):
        def decode(self, codes: Any, /) -> Any:
            return (np.repeat(codes[..., None], 3, axis=-1) + 0.6) / 127.5 - 1

    expected = np.repeat(np.arange(1, 17).reshape(1, 1, 4, 4, 1), 3, axis=-1)
    np.testing.assert_array_equal(decode_frames(Between(), levels), expected)


def test_models_without_vision_or_codec_are_refused(vision_model: Model) -> None:
    text_model = Model(
        source="tiny", config=tiny_model.CONFIG, weights=tiny_model.fused(),
        open_tokenizer=tokenizer, dtype="float32", mesh=None,
    )  # fmt: skip
    with pytest.raises(InputError, match="text model"):
        text_model.image("an apple")
    with pytest.raises(InputError, match="'codes' and tiny reads text only"):
        text_model.chat([{"role": "user", "content": [{"type": "codes", "codes": [[1]]}]}])
    with pytest.raises(ConfigError, match="tiny-vision-model has no VQGAN"):
        model().image("an apple")
    wanted = FrameRequest(prompt=[1], unconditional=[1], sampling=Sampling())
    with pytest.raises(InputError, match="text model"):
        generate_frames(lambda *needs: pytest.fail("made"), tiny_model.CONFIG, wanted)
    with pytest.raises(ConfigError, match="3 codes, which are not a square"):
        decode_frames(Shades(), np.zeros((1, 1, 3), int))
