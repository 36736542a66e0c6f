"""Show a page for people at `/`: chat, and with a vision-language model images and videos.

What it asks goes through the same worker, queue and limits as the API.
"""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import pydantic
from fastapi import FastAPI
from gradio import processing_utils
from gradio.themes import Default

from lwm.core.config import first_fault
from lwm.core.errors import InputError, LwmError
from lwm.data.text.documents import read_document
from lwm.generation.vision_prompts import Part
from lwm.media.images import is_image
from lwm.media.videos import is_video, write_video
from lwm.serving.drawing import Drawing
from lwm.serving.host import Host
from lwm.serving.schemas import ImageBody, TextBody, VideoBody
from lwm.serving.video_jobs import FPS

_DOCUMENTS = (".txt", ".md", ".html", ".pdf", ".docx", ".epub")
_MEDIA = ("image", "video")
_SAVE: Any = ["download"]  # there is a button that shares with another site, too
_KEPT = 3600  # seconds that uploads and drawings stay on disk
_STYLE = """
.gradio-container {max-width: 60rem !important; width: 100% !important; margin: auto}
.drawn img, .drawn video {image-rendering: pixelated}
footer, [aria-label="Share"] {display: none !important}
"""


def make_page(host: Host, *, draws: bool, most_bytes: int) -> FastAPI:
    """Return the ASGI application of the page.

    Args:
        draws: whether the model makes and sees images, so that the page offers it.
        most_bytes: of an upload.
    """
    # All files of the page: nothing outside this directory is served or opened.
    temporary = tempfile.TemporaryDirectory(prefix="lwm-page-")
    directory = Path(temporary.name).resolve()
    os.environ["GRADIO_TEMP_DIR"] = str(directory)
    processing_utils.async_ssrf_protected_download = _refuse_address
    with gr.Blocks(
        title=host.name, analytics_enabled=False, delete_cache=(_KEPT, _KEPT)
    ) as blocks:
        gr.Markdown(f"# {host.name}")
        with gr.Tab("Chat"):
            _add_chat(host, draws, directory)
        if draws:
            with gr.Tab("Image"):
                _add_images(host)
            with gr.Tab("Video"):
                _add_videos(host, directory)
    # Gradio checks the paths in requests once `launch` was called, which a mounted page never is.
    blocks.has_launched = True
    blocks.queue(default_concurrency_limit=None, api_open=False)
    app = FastAPI(openapi_url=None)
    app.state.directory = temporary  # removed with the application
    system = ("system-ui", "sans-serif")
    return gr.mount_gradio_app(
        app, blocks, "/", theme=Default(font=system, font_mono=("monospace",)),
        css=_STYLE, footer_links=[], show_error=False, run_history=False,
        max_file_size=most_bytes, ssr_mode=False, enable_monitoring=False, mcp_server=False,
    )  # fmt: skip


async def _refuse_address(url: str, cache_dir: str) -> str:
    """Refuse files that a request names by address, in place of Gradio's download."""
    raise gr.Error("no address is fetched; upload the file")


def _add_chat(host: Host, draws: bool, directory: Path) -> None:
    kinds = [*_DOCUMENTS, *(_MEDIA if draws else ())]
    settings: list[Any] = [
        gr.Textbox(label="System", placeholder="How the model should answer", render=False),
        gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", render=False),
        gr.Slider(0.05, 1, 1, step=0.05, label="Top p", render=False),
        gr.Number(512, label="Most tokens of an answer", precision=0, minimum=1, render=False),
        gr.Number(None, label="Seed", precision=0, placeholder="random", render=False),
    ]

    async def answer(
        message: Mapping[str, Any], history: Sequence[Mapping[str, Any]], system: str | None,
        temperature: float, top_p: float, most: int, seed: int | None,
    ) -> AsyncIterator[str]:  # fmt: skip
        files = [{"type": "file", "file": _described(one)} for one in message.get("files", ())]
        asked = [*files, {"type": "text", "text": message.get("text", "")}]
        try:
            host.worker.require_ready()
            host.note(message.get("text", ""))
            turns: list[Any] = [{"role": "system", "content": system}] if system else []
            for turn in (*history, {"role": "user", "content": asked}):
                parts = await asyncio.to_thread(_parts, turn["content"], directory)
                turns.append({"role": turn["role"], "content": parts})
            body = TextBody(
                model=host.name, temperature=temperature, top_p=top_p,
                seed=None if seed is None else int(seed),
            )  # fmt: skip
            prompt = await asyncio.to_thread(host.chat_prompt, turns)
            requests = host.text_requests(prompt, body, max_tokens=int(most or 512), logprobs=0)
            text = ""
            async for _, piece in host.answers(requests, (), continued=False):
                text += piece.text
                yield text
        except LwmError as error:
            raise _shown(error) from error

    gr.ChatInterface(
        answer, multimodal=True, additional_inputs=settings,
        additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
        chatbot=gr.Chatbot(height="60vh", render=False, show_label=False, buttons=["copy"]),
        textbox=gr.MultimodalTextbox(
            file_count="multiple", file_types=kinds, sources=["upload"], stop_btn=True,
            render=False,
            placeholder="Ask something" + (", also about pictures and videos" if draws else ""),
        ),
        concurrency_limit=None, analytics_enabled=False, api_visibility="private",
    )  # fmt: skip


def _parts(content: Any, directory: Path) -> list[Part]:
    """Return a message's content as parts for the model, with documents as text."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts: list[Part] = []
    for part in content:
        if part["type"] == "text":
            parts.append({"type": "text", "text": part["text"]})
            continue
        path = _own(part["file"]["path"], directory)
        if is_image(path) or is_video(path):
            parts.append(_media(path))
        else:
            parts.append({"type": "text", "text": read_document(path) + "\n\n"})
    return parts


def _described(file: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a file in the form that a history has; a new message has its path alone."""
    return {"path": file} if isinstance(file, str) else file


def _own(path: str, directory: Path) -> Path:
    """Return the path of an upload; refuse any other, whatever Gradio let through."""
    resolved = Path(path).resolve()
    if not resolved.is_relative_to(directory):
        raise InputError(f"{resolved.name!r} was not uploaded here; upload it")
    return resolved


def _media(path: Path) -> Part:
    """Return an image or a video as a part; what moves is a video."""
    kind = "video" if is_video(path) else "image"
    return {"type": kind, kind: path}


def _shown(error: LwmError) -> gr.Error:
    return gr.Error(str(error), print_exception=False)


def _add_drawing_settings() -> list[Any]:
    """Add what images and videos have in common; empty fields are the model's own settings."""
    with gr.Accordion("Settings", open=False):
        return [
            gr.Number(None, label="Seed", precision=0, placeholder="random"),
            gr.Number(None, label="Temperature", placeholder="the model's", minimum=0),
            gr.Number(None, label="Guidance", placeholder="the model's"),
            gr.Textbox(label="Not this", placeholder="what guidance leads away from"),
        ]


def _settings(values: Sequence[Any]) -> dict[str, Any]:
    names = ("seed", "temperature", "guidance", "negative_prompt")
    given = dict(zip(names, values, strict=True))
    return {name: value for name, value in given.items() if value not in (None, "")}


def _add_images(host: Host) -> None:
    prompt = gr.Textbox(label="Image of", placeholder="a small cat at the top left on blue")
    count = gr.Slider(1, 8, 1, step=1, label="How many")
    settings = _add_drawing_settings()
    start, stop = _buttons()
    drawn = gr.Gallery(
        label="Images", columns=4, height=384, object_fit="contain", elem_classes="drawn",
        buttons=_SAVE,
    )  # fmt: skip

    async def draw(text: str | None, count: int, *values: Any) -> AsyncIterator[Any]:
        body = _body(ImageBody, host, text or "", n=int(count), **_settings(values))
        async for frames in _drawn(host, body, total=1, count=int(count)):
            yield [(video[0], None) for video in frames]

    _connect(draw, start, stop, prompt, [prompt, count, *settings], drawn)


def _add_videos(host: Host, directory: Path) -> None:
    prompt = gr.Textbox(label="Video of", placeholder="a cat moving right slowly on blue")
    frames = gr.Slider(1, 64, 8, step=1, label="Frames, with those of the beginning")
    before = gr.File(
        label="Begin with an image, or continue a video", file_types=[*_MEDIA],
        type="filepath", height=160,
    )  # fmt: skip
    settings = _add_drawing_settings()
    start, stop = _buttons()
    drawn = gr.Video(
        label="Video", height=384, autoplay=True, loop=True, elem_classes="drawn", buttons=_SAVE
    )

    async def draw(
        text: str | None, count: int, path: str | None, *values: Any
    ) -> AsyncIterator[Any]:
        body = _body(VideoBody, host, text or "", frames=int(count), **_settings(values))
        part = None if path is None else {**_media(_own(path, directory)), "fps": FPS}
        async for videos in _drawn(host, body, total=int(count), before=part):
            with tempfile.TemporaryDirectory() as folder:  # Gradio keeps a copy
                file = Path(folder) / "video.mp4"
                await asyncio.to_thread(write_video, file, videos[0], fps=FPS)
                yield str(file)

    _connect(draw, start, stop, prompt, [prompt, frames, before, *settings], drawn)


def _body(kind: Any, host: Host, prompt: str, **settings: Any) -> Any:
    try:
        return kind(model=host.name, prompt=prompt, **settings)
    except pydantic.ValidationError as error:
        raise gr.Error(first_fault(error.errors()), print_exception=False) from error


async def _drawn(
    host: Host, body: Any, *, total: int, count: int = 1, before: Part | None = None
) -> AsyncIterator[Any]:
    """Draw on another thread, and show its progress; leaving the iterator ends it."""
    progress = gr.Progress()
    loop, done = asyncio.get_running_loop(), asyncio.Queue[int]()

    def frame_done(video: int, frame: int, codes: Any) -> None:
        loop.call_soon_threadsafe(done.put_nowait, frame + 1)

    drawing: Drawing | None = None
    try:
        host.worker.require_ready()
        host.note(body.prompt)
        if not body.prompt.strip():
            raise InputError("the prompt is empty; describe what to draw")
        drawing = Drawing(host)
        work = asyncio.ensure_future(
            asyncio.to_thread(
                drawing.frames, body, frames=total, count=count, before=before,
                frame_done=frame_done,
            )
        )  # fmt: skip
        progress((0, total), unit="frames")
        while not work.done():
            frame = asyncio.ensure_future(done.get())
            await asyncio.wait({work, frame}, return_when=asyncio.FIRST_COMPLETED)
            if frame.done():
                progress((frame.result(), total), unit="frames")
            frame.cancel()
        yield await work
    except LwmError as error:
        raise _shown(error) from error
    finally:
        if drawing is not None:
            drawing.cancel()


def _buttons() -> tuple[Any, Any]:
    with gr.Row():
        return gr.Button("Draw", variant="primary"), gr.Button("Stop", variant="stop")


def _connect(
    draw: Any, start: Any, stop: Any, prompt: Any, inputs: list[Any], output: Any
) -> None:
    running = gr.on([start.click, prompt.submit], draw, inputs, output, api_visibility="private")
    stop.click(None, cancels=[running], api_visibility="private")
