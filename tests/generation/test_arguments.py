"""Call the Python interface with wrong values: each is refused in one sentence."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_vision_model import model

import lwm
from lwm.core.errors import ConfigError, InputError, LwmError
from lwm.generation.model import Model

HALF = "a\ud800"
NAN = float("nan")
WRONG: Any = 5
PIXELS = np.zeros((2, 2, 3), np.uint8)


class Black:
    """Convert everything to zeros."""

    config = SimpleNamespace(image_size=2)

    def encode(self, pixels: Any, /) -> Any:
        return np.zeros((len(pixels), 2, 2), int)

    def decode(self, codes: Any, /) -> Any:
        return np.zeros((*codes.shape, 3))


@pytest.fixture(scope="module")
def seeing() -> Model:
    made = model()
    made.codec = Black()
    return made


def chat(content: Any, role: Any = "user") -> Callable[[Any], Any]:
    return lambda model: model.chat([{"role": role, "content": content}])


def part(**fields: Any) -> Callable[[Any], Any]:
    return chat([{"type": "text", "text": "what?"}, fields])


def generate(**settings: Any) -> Callable[[Any], Any]:
    return lambda model: model.generate("once", **settings)


def load(*arguments: Any, **settings: Any) -> Callable[[Any], Any]:
    return lambda _: lwm.load(*arguments, **settings)


INPUT: list[tuple[Callable[[Any], Any], str]] = [
    (lambda model: model.chat("hi"), "messages is 'hi'; it must be a list of mappings"),
    (lambda model: model.chat(None), "messages is None"),
    (lambda model: model.chat([5]), "messages is"),
    (lambda model: model.chat({"role": "user", "content": "x"}), "messages is {"),
    (lambda model: model.chat([]), "conversation is empty"),
    (lambda model: model.chat([{}]), "malformed"),
    (lambda model: model.chat([{"role": "user", "content": "x"}], template=5), "template is 5"),
    (chat(5), "malformed"),
    (chat(b"x"), "malformed"),
    (chat("x", role=5), "malformed"),
    (chat([5]), "part of type 'int'"),
    (chat([{"type": "text", "text": 5}]), "malformed"),
    (chat(HALF), r"half of a surrogate pair, U\+D800"),
    (chat([{"type": "text", "text": HALF}, {"type": "codes", "codes": [[1] * 4]}]), "surrogate"),
    (part(type=["x"]), "part of type"),
    (part(type="image", image=5), "contains int"),
    (part(type="image", image=PIXELS / 255), "type float64; uint8"),
    (part(type="image", image=PIXELS[..., 0]), r"shape \[2, 2\]"),
    (part(type="image", image="//[x"), "does not exist"),
    (part(type="image", image="a\0b"), "does not exist"),
    (part(type="image", image=HALF), "does not exist"),
    (part(type="image_url", image_url={"url": "data:;base64,@@"}), "data: URL"),
    (part(type="image_url", image_url={"url": f"data:,{HALF}"}), "not an image"),
    (part(type="video", video=PIXELS), r"shape \[2, 2, 3\]"),
    (part(type="video", video=PIXELS[None], max_frames=1.5), "max_frames is 1.5"),
    (part(type="video", video=PIXELS[None], max_frames=True), "max_frames is True"),
    (part(type="video", video=PIXELS[None], fps=NAN), "fps is nan"),
    (part(type="codes", codes="x"), "whole numbers"),
    (part(type="codes", codes=[[99, 1, 1, 1]]), "codes run from 1 to 99"),
    (part(type="codes", codes=[[2**70, 1, 1, 1]]), "whole numbers"),
    (lambda model: model.generate(5), "prompt is 5; it must be text"),
    (lambda model: model.generate(b"x"), "prompt is b'x'"),
    (lambda model: model.generate(HALF), "surrogate"),
    (generate(max_tokens=1.5), "max_tokens is 1.5; it must be a whole number"),
    (generate(max_tokens=True), "max_tokens is True"),
    (generate(max_tokens=None), "max_tokens is None"),
    (generate(stop=5), "stop is 5; it must be text or a list of text"),
    (generate(stop=["a", 5]), "stop is"),
    (generate(stop=""), "stop string is empty"),
    (generate(stop=HALF), "surrogate"),
    (generate(seed=1.5), "seed is 1.5; it must be a whole number"),
    (generate(seed=True), "seed is True"),
    (generate(temperature="hot"), "temperature is 'hot'; it must be a number"),
    (generate(temperature=np.ones(2)), "temperature is array"),
    (generate(stream=5), "stream is 5"),
    (lambda model: model.logits("x"), "whole numbers"),
    (lambda model: model.logits([1, 2]), "whole numbers"),
    (lambda model: model.logits([[1], [1, 2]]), "whole numbers"),
    (lambda model: model.logits([[1.5]]), "type float64"),
    (lambda model: model.logits([[True]]), "type bool"),
    (lambda model: model.logits([[-1]]), "run from -1"),
    (lambda model: model.logits([[10**6]]), "ids 0 to 299"),
    (lambda model: model.logits(np.zeros((1, 0), int)), "at least one"),
    (lambda model: model.logits([[1]], vision_mask=[[True], [True, False]]), "vision_mask"),
    (lambda model: model.logits([[1]], vision_mask=[[1]]), "vision_mask"),
    (lambda model: model.image(5), "prompt is 5"),
    (lambda model: model.image("x", count=1.5), "count is 1.5"),
    (lambda model: model.image("x", negative_prompt=5), "negative_prompt is 5"),
    (lambda model: model.image("x", negative_prompt=HALF), "surrogate"),
    (lambda model: model.image("x", frame_done=5), "frame_done is 5"),
    (lambda model: model.video("x", frames="3"), "frames is '3'"),
    (lambda model: model.video("x", frames=True), "frames is True"),
    (lambda model: model.video("x", before="x"), "whole numbers"),
    (lambda model: model.codes("x"), "part is 'x'; it must be a mapping"),
    (load(5), "model is 5; it must be text or a path"),
    (load("smollm2", mesh=4), "mesh is 4"),
    (load("smollm2", dtype=5), "dtype is 5"),
    (load("smollm2", theta="x"), "theta is 'x'"),
    (load("smollm2", context=1.5), "context is 1.5"),
    (load("smollm2", tokenizer=5), "tokenizer is 5"),
    (lambda _: lwm.load_vqgan(WRONG), "path is 5"),
]  # fmt: skip

SETTINGS: list[tuple[Callable[[Any], Any], str]] = [
    (generate(max_tokens=-1), "max_tokens is -1"),
    (generate(temperature=NAN), "temperature is nan"),
    (generate(temperature=-0.5), "temperature is -0.5"),
    (generate(seed=-1), "seed is -1"),
    (generate(seed=2**32), "seed is 4294967296"),
    (generate(top_k=-1), "top_k is -1"),
    (generate(top_p=NAN), "top_p is nan"),
    (generate(repetition_penalty=float("inf")), "repetition_penalty is inf"),
    (generate(tint=1), "the setting 'tint' is unknown"),
    (lambda model: model.image("x", count=0), "count is 0"),
    (lambda model: model.image("x", guidance=NAN), "guidance is nan"),
    (load("smollm2", dtype="x"), "dtype is 'x'"),
    (load("smollm2", mesh="x"), "mesh 'x'"),
]


@pytest.mark.parametrize("number", range(len(INPUT) + len(SETTINGS)))
def test_wrong_values_are_refused(seeing: Model, number: int) -> None:
    call, message = [*INPUT, *SETTINGS][number]
    error = InputError if number < len(INPUT) else ConfigError
    with pytest.raises(error, match=message) as refused:
        call(seeing)
    assert "\n" not in str(refused.value)


def test_an_unknown_path_with_a_surrogate_is_refused() -> None:
    with pytest.raises(LwmError, match="there is no model"):
        lwm.load(HALF)


def test_scalars_of_numpy_are_numbers(seeing: Model) -> None:
    plain = seeing.generate("once", max_tokens=3, temperature=0.5, seed=3, top_k=9, stop="zzz")
    assert plain == seeing.generate(
        "once", max_tokens=np.int64(3), temperature=np.float32(0.5), seed=np.uint32(3),
        top_k=np.int8(9), stop=["zzz"],
    )  # fmt: skip
