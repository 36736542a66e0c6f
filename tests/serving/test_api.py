"""Ask a running server with OpenAI's client and with raw requests, and compare with the model."""

import base64
import io
import json
import math
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from running import running, vision_model

from lwm.generation.model import Model
from lwm.serving.host import Host

MESSAGES: Any = [{"role": "user", "content": "What is in the garden?"}]
LONG = "".join(chr(97 + 7 * n % 26) for n in range(150))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return vision_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def host(model: Model) -> Host:
    return Host("tiny", lambda: model, slots=2, context=0, queue=3)


@pytest.fixture(scope="module")
def address(host: Host) -> Iterator[str]:
    with running(host) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Return the same model with an engine of its own."""
    return vision_model(tmp_path_factory.mktemp("reference"))


def test_the_model_is_named_and_healthy(client: openai.OpenAI, address: str) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert httpx.get(f"{address}/health").json() == {"status": "ready"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_is_answered_as_by_chat(
    client: openai.OpenAI, reference: Model, stream: bool
) -> None:
    ask: Any = client.chat.completions.create
    settings: Any = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 30}
    if stream:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        events = list(ask(**settings, **options))
        assert events[0].choices[0].delta.role == "assistant"
        text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
        finish, usage = events[-2].choices[0].finish_reason, events[-1].usage
        assert events[-1].choices == []
    else:
        answer = ask(**settings)
        text, usage = answer.choices[0].message.content, answer.usage
        finish = answer.choices[0].finish_reason
    assert text == reference.chat(MESSAGES, max_tokens=30)
    assert finish == ("length" if usage.completion_tokens == 30 else "stop")
    assert usage.prompt_tokens == len(reference.chat_tokens(MESSAGES))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_choices_have_seeds_of_their_own(client: openai.OpenAI, reference: Model) -> None:
    settings: Any = {"temperature": 1.3, "top_p": 0.9, "seed": 7}
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=12, n=3, **settings
    )
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for number, text in enumerate(texts):
        alone = reference.chat(MESSAGES, max_tokens=12, **{**settings, "seed": 7 + number})
        assert text == alone
    assert len(set(texts)) > 1
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(reference.chat_tokens(MESSAGES))


def test_stop_strings_end_an_answer(client: openai.OpenAI, reference: Model) -> None:
    prompt, stop = "hello there", "xw"
    whole = reference.generate(prompt, max_tokens=40)
    assert whole.index(stop) > 0
    endings: list[Any] = [{"stop": stop}, {"stop": ["never", stop]}]
    for settings in endings:
        answer: Any = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=40, temperature=0, **settings
        )
        assert answer.choices[0].text == whole[: whole.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        events: Any = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=40, temperature=0, stream=True, **settings
        )
        assert "".join(e.choices[0].text for e in events) == whole[: whole.index(stop)]


def test_log_probabilities_of_a_chat_are_those_of_the_model(
    client: openai.OpenAI, reference: Model
) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=5, logprobs=True,
        top_logprobs=3,
    )  # fmt: skip
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    prompt = reference.chat_tokens(MESSAGES)
    for row in logprobs.content:
        logits = reference.logits([prompt]).text[0, -1].astype(np.float64)
        scores = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        best = np.argsort(-scores)[:3]
        assert math.isclose(row.logprob, scores[best[0]], abs_tol=1e-4)
        np.testing.assert_allclose([x.logprob for x in row.top_logprobs], scores[best], atol=1e-4)
        assert len({x.token for x in row.top_logprobs}) == 3  # also of bytes that are no text
        prompt.append(int(best[0]))


def test_penalties_and_prompts_in_every_form(client: openai.OpenAI, reference: Model) -> None:
    ids = reference.tokenizer.encode("Once", specials=True)
    penalties: Any = {"presence_penalty": 0.8, "frequency_penalty": 0.5}
    expected = reference.generate("Once", max_tokens=15, **penalties)
    forms: list[Any] = ["Once", ids, ["Once", "Once"], [ids, ids]]
    for prompt in forms:
        answer = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=15, temperature=0, **penalties
        )
        assert {choice.text for choice in answer.choices} == {expected}
        assert len(answer.choices) == (2 if prompt in forms[2:] else 1)


def test_an_echo_has_the_likelihood_of_every_token(
    client: openai.OpenAI, reference: Model
) -> None:
    ids = reference.tokenizer.encode("Once upon a time", specials=True)
    for max_tokens in (0, 1):
        answer = client.completions.create(
            model="tiny", prompt=ids, max_tokens=max_tokens, temperature=0, echo=True, logprobs=2
        )
        choice = answer.choices[0]
        assert choice.text.startswith("Once upon a time")
        assert choice.logprobs is not None
        values, best = choice.logprobs.token_logprobs, choice.logprobs.top_logprobs
        assert values is not None
        assert best is not None
        assert len(values) == len(best) == len(ids) + max_tokens
        logits = reference.logits([ids]).text[0].astype(np.float64)
        scores = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        assert values[0] is None
        expected = scores[range(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(values[1 : len(ids)], expected, atol=1e-4)
        for row, place in zip(best[1:], scores, strict=False):
            np.testing.assert_allclose(sorted(row.values()), np.sort(place)[-2:], atol=1e-4)


def test_an_echo_alone_is_the_same_in_a_stream(client: openai.OpenAI) -> None:
    settings: Any = {"model": "tiny", "prompt": "Once", "max_tokens": 0, "echo": True}
    whole = client.completions.create(**settings).choices[0]
    events: Any = list(client.completions.create(**settings, stream=True))
    assert "".join(event.choices[0].text for event in events) == whole.text == "Once"
    assert events[-1].choices[0].finish_reason == whole.finish_reason == "length"


def data_url(pixels: np.ndarray, form: str = "PNG") -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def test_images_are_seen_and_drawn(client: openai.OpenAI, reference: Model) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    url = data_url(pixels)
    content = [
        {"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}
    ]  # fmt: skip
    messages: Any = [{"role": "user", "content": content}]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=20
    )
    assert answer.choices[0].message.content == reference.chat(messages, max_tokens=20)
    drawn = client.images.generate(
        model="tiny", prompt="a cat", n=2, size="8x8",  # type: ignore[arg-type]
        extra_body={"seed": 3, "guidance": 2.0, "top_k": 5},
    )  # fmt: skip
    expected = reference.image("a cat", count=2, seed=3, guidance=2.0, top_k=5)
    assert drawn.data is not None
    for image, pixels in zip(drawn.data, expected, strict=True):
        assert image.b64_json is not None
        data = np.asarray(Image.open(io.BytesIO(base64.b64decode(image.b64_json))))
        np.testing.assert_array_equal(data, pixels)


def test_text_and_tokens_are_converted(address: str, reference: Model) -> None:
    text = "Hello </s> world"
    tokens = httpx.post(f"{address}/tokenize", json={"prompt": text}).json()
    assert tokens["tokens"] == reference.tokenizer.encode(text, specials=True)
    assert 1 not in tokens["tokens"][1:]  # what a text spells is no control token
    back = httpx.post(f"{address}/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert back == {"prompt": text}
    info = httpx.get(f"{address}/tokenizer_info").json()
    assert (info["bos_token"], info["max_model_len"]) == ("<s>", 256)


ASK = "chat/completions"
CHAT = {"model": "tiny", "messages": MESSAGES}
COMPLETE = {"model": "tiny", "prompt": "Once"}
DRAW = {"model": "tiny", "prompt": "a cat"}


def bomb() -> str:
    """Return the URL of a PNG that takes gigabytes as pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    side = 30_000
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((side // 8 + 1) * side))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + parts).decode()


def with_part(part: dict[str, Any]) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": [part]}]}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (ASK, b"{", 400, "not JSON"),
        (ASK, b"[]", 400, "object|dictionary"),
        (ASK, {**CHAT, "messages": []}, 400, "messages"),
        (ASK, {**CHAT, "messages": "hello"}, 400, "messages"),
        (ASK, {**CHAT, "model": "other"}, 404, "no model 'other'"),
        (ASK, {"messages": MESSAGES}, 400, "model"),
        (ASK, {**CHAT, "temperature": -1}, 400, "temperature"),
        (ASK, b'{"model": "tiny", "messages": [], "top_p": NaN}', 400, "top_p|messages"),
        (ASK, {**CHAT, "stop": ["x"] * 10_000}, 400, "stop"),
        (ASK, {**CHAT, "tools": [{"type": "function"}]}, 400, "tools is not supported"),
        (ASK, {**CHAT, "response_format": {"type": "json_object"}}, 400, "response_f"),
        (ASK, {**CHAT, "top_logprobs": 2}, 400, "needs logprobs"),
        (ASK, {**CHAT, "max_tokens": 0}, 400, "max_tokens"),
        (ASK, {**CHAT, "messages": [{"role": "king", "content": "x"}]}, 400, "role"),
        (
            ASK,
            {**CHAT, "messages": [{"role": "user", "content": "x" * 999}]},
            400,
            r"1,0\d\d tokens.*256",
        ),
        (
            ASK,
            with_part({"type": "image_url", "image_url": {"url": "http://example.org/x.png"}}),
            400,
            "nothing is fetched",
        ),
        (
            ASK,
            with_part({"type": "image_url", "image_url": {"url": "/etc/passwd"}}),
            400,
            "nothing is fetched",
        ),
        (ASK, with_part({"type": "image", "image": "/etc/passwd"}), 400, "'image' is"),
        (ASK, with_part({"type": "input_audio"}), 400, "'input_audio' is not"),
        (
            ASK,
            with_part({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}),
            400,
            "image",
        ),
        (
            ASK,
            with_part({"type": "image_url", "image_url": {"url": bomb()}}),
            400,
            "pixels",
        ),
        ("completions", {**COMPLETE, "prompt": ""}, 400, "empty"),
        ("completions", {**COMPLETE, "prompt": [[]]}, 400, "prompt"),
        ("completions", {**COMPLETE, "prompt": [1, 99999]}, 400, "99999.*vocabulary"),
        ("completions", {**COMPLETE, "max_tokens": 0}, 400, "max_tokens is 0"),
        ("completions", {**COMPLETE, "suffix": "x"}, 400, "suffix is not supported"),
        ("completions", {**COMPLETE, "stream_options": {}}, 400, "needs stream"),
        ("images/generations", {**DRAW, "size": "512x512"}, 400, "512x512.*8x8"),
        ("images/generations", {**DRAW, "response_format": "url"}, 400, "response_format"),
        ("images/generations", {**DRAW, "prompt": "x" * 900}, 400, r"tokens.*256|context"),
        ("nothing", {}, 404, "not an endpoint"),
    ],
)  # fmt: skip
def test_what_is_wrong_gets_its_status_and_a_sentence(
    address: str, path: str, body: Any, status: int, message: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(
        f"{address}/v1/{path}", content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert re.search(message, error["message"]), error["message"]
