"""Define the endpoints, and what their errors look like."""

import asyncio
import base64
import io
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from PIL import Image
from pydantic import ValidationError
from sse_starlette import EventSourceResponse
from sse_starlette.sse import AppStatus
from starlette.exceptions import HTTPException

import lwm
from lwm.core.config import first_fault
from lwm.core.errors import InputError, LwmError
from lwm.generation.media_inputs import data_url_bytes
from lwm.generation.vision_prompts import Part, require_vision
from lwm.serving.drawing import Drawing
from lwm.serving.guard import Guard, error_body
from lwm.serving.host import Host
from lwm.serving.metrics import Metrics
from lwm.serving.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    DrawingBody,
    ImageBody,
    TokenizeBody,
    VideoBody,
)
from lwm.serving.texts import ChatReply, CompletionReply, Reply
from lwm.serving.video_jobs import Job, UnknownVideo, VideoJobs
from lwm.serving.worker import Busy, Stopping


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


def make_app(host: Host, access: Access, jobs: VideoJobs, page: Any = None) -> Any:
    """Return the ASGI application that serves a model.

    Args:
        page: the application of every path that is not the API's, if there is one.
    """
    # Streams end with their answers when the server stops; uvicorn ends those that take too long.
    AppStatus.disable_automatic_graceful_drain()
    app = _Api(host)
    metrics = Metrics(host)
    _add_errors(app)
    _add_status(app, host, metrics)
    _add_texts(app, host)
    _add_images(app, host)
    _add_videos(app, host, jobs)
    _add_tokens(app, host)
    roots = {getattr(route, "path", "/").split("/")[1] for route in app.routes}

    async def both(scope: Any, receive: Any, send: Any) -> None:
        of_api = scope["type"] == "http" and scope["path"].split("/")[1] in roots
        if page is not None and not of_api:
            await page(scope, receive, send)
            return
        host.requests += 1
        try:
            await app(scope, receive, send)
        finally:
            host.requests -= 1

    guarded: Any = Guard(
        metrics.measured(both), access.keys, access.hosts, access.most_bytes, access.origins
    )
    if access.origins:
        from starlette.middleware.cors import CORSMiddleware

        guarded = CORSMiddleware(
            guarded, allow_origins=list(access.origins), allow_methods=["*"], allow_headers=["*"]
        )
    return guarded


class _Api(FastAPI):
    """Name the model in the OpenAPI document, as the one value that requests may have."""

    def __init__(self, host: Host) -> None:
        super().__init__(title="lwm", version=lwm.__version__, docs_url=None, redoc_url=None)
        self._name = host.name

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        for schema in document["components"]["schemas"].values():
            if "model" in schema.get("properties", {}):
                schema["properties"]["model"] = {"type": "string", "enum": [self._name]}
        return document


def _add_errors(app: FastAPI) -> None:
    def respond(status: int, message: str, kind: str = "invalid_request_error") -> JSONResponse:
        return JSONResponse(error_body(message, kind=kind), status)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        if error.errors()[0]["type"] == "json_invalid":
            return respond(400, "the body is not JSON; send one object")
        return respond(
            400, first_fault(error.errors()).removeprefix("body: ").removeprefix("body.")
        )

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
    statuses: dict[type[LwmError], int] = {
        Busy: 429,
        Stopping: 503,
        UnknownModel: 404,
        UnknownVideo: 404,
    }
    return (statuses.get(type(error), 400),)


class UnknownModel(LwmError):
    """Signal that a request names another model than the one that is served."""


def _require_model(host: Host, name: str | None) -> None:
    if name is not None and name != host.name:
        raise UnknownModel(f"there is no model {name[:100]!r}; this server has {host.name!r}")
    host.worker.require_ready()


def _accept(host: Host, body: ChatBody | CompletionBody | DrawingBody) -> None:
    """Refuse a request for another model; log what others ask, if that is wanted."""
    _require_model(host, body.model)
    host.note(body.messages if isinstance(body, ChatBody) else body.prompt)


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
        _accept(host, body)
        return await _reply(await ChatReply.open(host, body), body.stream, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        _accept(host, body)
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
        _accept(host, body)
        require_vision(host.model.config)
        side = _require_size(host, body)
        drawing = Drawing(host)
        try:
            work = asyncio.to_thread(drawing.frames, body, count=body.n)
            pictures = (await _unless_gone(request, work))[:, 0]
        finally:
            drawing.cancel()
        return {
            "created": int(time.time()),
            "data": [{"b64_json": base64.b64encode(_png(pixels)).decode()} for pixels in pictures],
            "output_format": "png",
            "size": f"{side}x{side}",
        }


def _require_size(host: Host, body: DrawingBody) -> int:
    """Return the side of what the model draws; refuse another size."""
    require_vision(host.model.config)
    side = host.model.codec.config.image_size
    if body.size not in (None, "auto", f"{side}x{side}"):
        raise InputError(f"size is {body.size[:20]!r}; this model draws {side}x{side}")
    return side


def _add_videos(app: FastAPI, host: Host, jobs: VideoJobs) -> None:
    @app.post("/v1/videos")
    async def create(request: Request) -> Job:
        body, first = await _video_request(request)
        _accept(host, body)
        _require_size(host, body)
        host.require_frames(body.prompt, body.frame_count)
        return await asyncio.to_thread(jobs.create, body, first)

    @app.get("/v1/videos")
    async def videos(
        after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:  # fmt: skip
        _require_model(host, None)
        every = list(jobs.list()) if order == "asc" else list(jobs.list())[::-1]
        start = 0 if after is None else every.index(jobs.get(after)) + 1
        page = every[start : start + limit]
        return {
            "object": "list",
            "data": page,
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
            "has_more": start + limit < len(every),
        }

    @app.get("/v1/videos/{identifier}")
    async def video(identifier: str) -> Job:
        _require_model(host, None)
        return jobs.get(identifier)

    @app.get("/v1/videos/{identifier}/content")
    async def content(identifier: str, variant: Literal["video"] = "video") -> Response:
        _require_model(host, None)
        return FileResponse(jobs.content(identifier), media_type="video/mp4")

    @app.delete("/v1/videos/{identifier}")
    async def delete(identifier: str) -> dict[str, Any]:
        _require_model(host, None)
        await asyncio.to_thread(jobs.delete, identifier)
        return {"id": identifier, "object": "video.deleted", "deleted": True}


async def _video_request(request: Request) -> tuple[VideoBody, Part | None]:
    """Read a video request, as JSON or as a form, and the image that it begins with."""
    first: Part | None = None
    if request.headers["content-type"].startswith("multipart/"):
        fields: Any = {}
        async with request.form(max_files=1, max_fields=32) as form:
            for name, value in form.items():
                if isinstance(value, str):
                    fields[name] = value
                elif name == "input_reference":
                    first = {"type": "image", "image": await value.read()}
                else:
                    raise InputError(f"the file {name[:50]!r} is not supported; leave it out")
    else:
        try:
            fields = await request.json()
        except ValueError as error:
            raise InputError("the body is not JSON; send one object") from error
    try:
        body = VideoBody.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    if body.input_reference is not None:
        url = body.input_reference.get("image_url")
        if set(body.input_reference) != {"image_url"} or not str(url).startswith("data:"):
            raise InputError(
                "input_reference needs image_url with a data: URL, or a file in a form"
            )
        first = {"type": "image", "image": data_url_bytes(str(url))}
    return body, first


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
