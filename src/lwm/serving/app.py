"""Define the endpoints, and what their errors look like."""

import asyncio
import base64
import io
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from sse_starlette import EventSourceResponse
from sse_starlette.sse import AppStatus
from starlette.exceptions import HTTPException

import lwm
from lwm.core.errors import InputError, LwmError
from lwm.generation.codec import decode_frames
from lwm.generation.frames import IMAGE, video_codes
from lwm.generation.vision_prompts import require_vision
from lwm.serving.guard import Guard, error_body
from lwm.serving.host import Host
from lwm.serving.metrics import Metrics
from lwm.serving.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ImageBody,
    TokenizeBody,
)
from lwm.serving.texts import ChatReply, CompletionReply, Reply
from lwm.serving.worker import Busy, RemoteEngine, Stopping

_SETTINGS = ("guidance", "temperature", "top_k", "top_p", "seed")


@dataclass(frozen=True)
class Access:
    """Set who may ask, and how much they may send.

    Args:
        keys: accepted as bearer tokens; none means that anybody may ask.
        hosts: names by which the server may be addressed; none means any.
        origins: sites whose pages may ask from a browser.
        most_bytes: of a body.
    """

    keys: Sequence[str] = ()
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    most_bytes: int = 64 << 20


def make_app(host: Host, access: Access) -> Any:
    """Return the ASGI application that serves a model."""
    # Streams end with their answers when the server stops; uvicorn ends those that take too long.
    AppStatus.disable_automatic_graceful_drain()
    app = FastAPI(title="lwm", version=lwm.__version__, docs_url=None, redoc_url=None)
    metrics = Metrics(host)
    _add_errors(app)
    _add_status(app, host, metrics)
    _add_texts(app, host)
    _add_images(app, host)
    _add_tokens(app, host)
    guarded: Any = Guard(metrics.measured(app), access.keys, access.hosts, access.most_bytes)
    if access.origins:
        from starlette.middleware.cors import CORSMiddleware

        guarded = CORSMiddleware(
            guarded, allow_origins=list(access.origins), allow_methods=["*"], allow_headers=["*"]
        )
    return guarded


def _add_errors(app: FastAPI) -> None:
    def respond(status: int, message: str, kind: str = "invalid_request_error") -> JSONResponse:
        return JSONResponse(error_body(message, kind=kind), status)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        return respond(400, _first_fault(error))

    @app.exception_handler(LwmError)
    async def _refused(request: Request, error: LwmError) -> Response:
        return respond(*_status(error), str(error))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        message = f"{request.method} {path[:100]} is not an endpoint; see docs/serving.md"
        return respond(
            error.status_code, message if error.status_code in (404, 405) else error.detail
        )

    @app.exception_handler(Exception)
    async def _bug(request: Request, error: Exception) -> Response:
        return respond(500, "the server failed; its log says why", "server_error")


def _status(error: LwmError) -> tuple[int]:
    statuses: dict[type[LwmError], int] = {Busy: 429, Stopping: 503, UnknownModel: 404}
    return (statuses.get(type(error), 400),)


def _first_fault(error: RequestValidationError) -> str:
    fault = error.errors()[0]
    place = ".".join(str(part) for part in fault["loc"] if part != "body")
    reason = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "json_invalid":
        return "the body is not JSON; send one object"
    return f"{place}: {reason}" if place else reason


class UnknownModel(LwmError):
    """Signal that a request names another model than the one that is served."""


def _require_model(host: Host, name: str | None) -> None:
    if name is not None and name != host.name:
        raise UnknownModel(f"there is no model {name[:100]!r}; this server has {host.name!r}")
    host.worker.require_ready()


def _add_status(app: FastAPI, host: Host, metrics: Metrics) -> None:
    started = int(time.time())

    def description() -> dict[str, Any]:
        return {"id": host.name, "object": "model", "created": started, "owned_by": "lwm"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [description()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        if name != host.name:
            raise UnknownModel(f"there is no model {name[:100]!r}; this server has {host.name!r}")
        return description()

    @app.get("/health")
    async def health() -> Response:
        state = host.worker.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get("/metrics")
    async def measurements() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")


def _add_texts(app: FastAPI, host: Host) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        _require_model(host, body.model)
        return await _reply(await ChatReply.open(host, body), body.stream, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        _require_model(host, body.model)
        return await _reply(await CompletionReply.open(host, body), body.stream, request)


async def _reply(reply: Reply, stream: bool, request: Request) -> Response:
    if not stream:
        return JSONResponse(await _unless_gone(request, reply.whole()))
    events = reply.events()
    first = await anext(events)  # so that what is refused has its status

    async def data() -> AsyncIterator[dict[str, str]]:
        yield {"data": first}
        try:
            async for event in events:
                yield {"data": event}
        except LwmError as error:
            yield {"data": JSONResponse(error_body(str(error))).body.decode()}  # type: ignore[union-attr]
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    return EventSourceResponse(data(), sep="\n")


async def _unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """Await work, and cancel it when the client leaves."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the client left")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


def _add_images(app: FastAPI, host: Host) -> None:
    @app.post("/v1/images/generations")
    async def images(body: ImageBody, request: Request) -> dict[str, Any]:
        _require_model(host, body.model)
        require_vision(host.model.config)
        side = host.model.codec.config.image_size
        if body.size not in (None, "auto", f"{side}x{side}"):
            raise InputError(f"size is {body.size[:20]!r}; this model draws {side}x{side}")
        drawing = Drawing(host)
        try:
            pictures = await _unless_gone(request, asyncio.to_thread(drawing.images, body))
        finally:
            drawing.cancel()
        return {
            "created": int(time.time()),
            "data": [{"b64_json": base64.b64encode(_png(pixels)).decode()} for pixels in pictures],
            "output_format": "png",
            "size": f"{side}x{side}",
        }


class Drawing:
    """Draw on a thread of its own with the worker's engine; `cancel` ends it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._engine = RemoteEngine(host.worker)

    def cancel(self) -> None:
        """End what is being drawn; do nothing if it is complete."""
        self._engine.cancel()

    def images(self, body: ImageBody) -> np.ndarray:
        """Draw all images of a request."""
        model = self._host.model
        settings = {
            name: value for name in _SETTINGS if (value := getattr(body, name)) is not None
        }
        settings.setdefault("seed", secrets.randbits(32))
        codes = video_codes(
            self._engine.with_room(self._host.require_room), model.config, model.tokenizer,
            body.prompt, frames=1, count=body.n, negative_prompt=body.negative_prompt,
            first_sampling=IMAGE.updated(settings),
        )  # fmt: skip
        return decode_frames(model.codec, codes)[:, 0]


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _add_tokens(app: FastAPI, host: Host) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        _require_model(host, body.model)
        encode: Callable[..., list[int]] = host.tokenizer.encode
        tokens = await asyncio.to_thread(encode, body.prompt, specials=body.add_special_tokens)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": host.context}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        _require_model(host, body.model)
        size = host.model.config.vocab_size
        wrong = next((token for token in body.tokens if token >= size), None)
        if wrong is not None:
            raise InputError(f"token {wrong} is outside the vocabulary of {size:,}")
        return {"prompt": await asyncio.to_thread(host.tokenizer.decode, body.tokens)}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        _require_model(host, None)
        tokenizer = host.tokenizer
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "vocab_size": tokenizer.vocab_size,
            "bos_token": tokenizer.bos,
            "eos_token": tokenizer.eos_text,
            "chat_template": tokenizer.chat_template,
            "max_model_len": host.context,
        }
