"""Chat with a model, also about documents, images and videos: `lwm chat`."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from lwm.cli.flags import Load, LoadFlags, ModelName, Sampling, SamplingFlags, print_stream
from lwm.cli.parsing import Text, read_text
from lwm.core import interrupts
from lwm.core.errors import CapacityError, InputError
from lwm.core.progress import console, say

Files = Annotated[tuple[Path, ...], tyro.conf.UseAppendAction]


def chat(
    model: ModelName,
    /,
    prompt: Text | None = None,
    document: Files = (),
    image: Files = (),
    video: Files = (),
    max_frames: int | None = None,
    fps: float | None = None,
    session: Path | None = None,
    system: Text | None = None,
    template: str = "auto",
    load: Load = LoadFlags(),
    sampling: Sampling = SamplingFlags(),
) -> None:
    """Chat with a model: answer one --prompt, or talk interactively.

    Args:
        prompt: Question to answer once.
        document: A txt, md, html, pdf, docx or epub file to chat about.
        image: Image to chat about.
        video: Video to chat about.
        max_frames: Frames sampled evenly from each video; defaults to 8 unless --fps is set.
        fps: Frames sampled from each second of a video.
        session: File that saves the conversation and the cache; an existing one is continued.
        system: System message.
        template: Chat template: auto (the model's), original, or chatml.
    """
    if prompt is not None and not prompt.strip():
        raise InputError("the prompt is empty; write a question after --prompt")
    resumed = session is not None and session.exists()
    if resumed and (document or image or video or system):
        raise InputError(
            f"the session {session} exists and has its context; leave out --document, --image, "
            "--video and --system, or name another --session"
        )
    if session is not None and not session.absolute().parent.is_dir():
        raise InputError(
            f"the session {session} cannot be written: there is no directory {session.parent}"
        )
    # Everything that may be refused is read before the user types.
    from lwm.data.text.documents import read_document
    from lwm.generation.session import load_session, save_session

    documents = [read_document(path) for path in document]
    loaded = load.load(model)
    loaded.tokenizer  # noqa: B018
    frames = {"max_frames": max_frames, "fps": fps}
    parts = [
        {"type": kind, kind: path} | (frames if kind == "video" else {})
        for kind, path in _in_order({"image": list(image), "video": list(video)}, sys.argv)
    ]
    opening: list[Any] = [] if system is None else [{"role": "system", "content": system}]
    if parts:  # refused before they are encoded, and encoded before the user types
        text = {"type": "text", "text": "\n\n".join([*documents, prompt or ""])}
        first = {"role": "user", "content": [text, *parts]}
        loaded.require_room([*opening, first], template=template, **vars(sampling))
    parts = [{"type": "codes", "codes": loaded.codes(part)} for part in parts]
    turns = [*load_session(session, loaded)] if session is not None and resumed else [*opening]

    def ask(question: str) -> None:
        content: Any = question
        if turns == opening:  # images and videos follow the first question, as in the original
            content = "\n\n".join([*documents, question])
            content = [{"type": "text", "text": content}, *parts] if parts else content
        user = {"role": "user", "content": content}
        pieces = loaded.chat([*turns, user], stream=True, template=template, **vars(sampling))
        answer = print_stream(pieces)
        turns.extend([user, {"role": "assistant", "content": answer}])  # unless interrupted
        say(f"({loaded.timings})")

    def reset() -> None:
        turns[:] = opening

    try:
        if prompt is not None:
            ask(prompt)
        else:
            with interrupts.patient():
                _interact(ask, reset, session)
    except KeyboardInterrupt:
        interrupts.acknowledge()  # so that there is time to save the session
        raise
    finally:  # prefilling may have taken long, so an interrupted session is saved as well
        if session is not None and turns != opening:
            save_session(session, loaded, turns)
            say(f"(saved the conversation in {session})")


def _interact(ask: Callable[[str], None], reset: Callable[[], None], session: Path | None) -> None:
    say("Type a question; /reset clears the conversation, /exit or Ctrl-D ends it.")
    while (line := _read_line()) is not None:
        match line.strip():
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/reset" if session is not None:
                say(f"{session} saves this conversation; exit, and start another --session.")
            case "/reset":
                reset()
                say("The conversation is cleared.")
            case question:
                try:
                    ask(question)
                except CapacityError as error:  # a shorter question may fit
                    say(f"{error}; or clear the conversation with /reset")
                except KeyboardInterrupt:
                    interrupts.acknowledge()
                    say("(stopped)")


def _in_order(files: dict[str, list[Path]], arguments: list[str]) -> Iterator[tuple[str, Path]]:
    """Yield the files of several options in the order of the command line, with their option."""
    for argument in arguments:
        option = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--") and files.get(option):
            yield option, files[option].pop(0)


def _read_line() -> str | None:
    """Read a line, or None at the end of input; the prompt goes to standard error."""
    try:
        return read_text(console.input("> ") if sys.stdin.isatty() else input())
    except EOFError:
        return None
