"""`lwm chat`: talk to a model, about documents, pictures and videos if some are given."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lwm.cli.flags import (
    Load,
    LoadFlags,
    ModelName,
    Sampling,
    SamplingFlags,
    in_order,
    print_stream,
)
from lwm.core.errors import CapacityError, InputError
from lwm.core.progress import console, say

if TYPE_CHECKING:
    from lwm.generation.model import Model


def chat(
    model: ModelName,
    /,
    prompt: str | None = None,
    document: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
    image: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
    video: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
    max_frames: int | None = None,
    fps: float | None = None,
    session: Path | None = None,
    system: str | None = None,
    template: str = "auto",
    load: Load = LoadFlags(),
    sampling: Sampling = SamplingFlags(),
) -> None:
    """Talk to a model; --prompt answers once, without it an interactive session.

    Args:
        prompt: A question to answer once.
        document: A txt, md, html or pdf file to talk about; may be given several times.
        image: A picture to talk about; may be given several times, also among videos.
        video: A video to talk about; may be given several times, also among pictures.
        max_frames: Frames taken of each video, evenly; 8 unless this or --fps is given.
        fps: Frames taken of each second of a video.
        session: A file that keeps the conversation and what the model has read; one that is there
            is gone on with.
        system: What the model is told before the conversation.
        template: How turns are written: auto (the model's own), original, or chatml.
    """
    from lwm.data.text.documents import read_document

    if prompt is not None and not prompt.strip():
        raise InputError("the prompt is empty; ask something after --prompt")
    if session is not None and session.exists() and (document or image or video or system):
        raise InputError(
            f"the session {session} is there and has its context; ask without --document, "
            "--image, --video and --system, or name another --session"
        )
    if session is not None and not session.absolute().parent.is_dir():
        raise InputError(
            f"the session {session} cannot be written: there is no directory {session.parent}"
        )
    context = "\n\n".join(read_document(path) for path in document)
    loaded = load.load(model)
    loaded.tokenizer  # noqa: B018  refuses a model without one before anybody types
    shown = [
        {kind: path, "type": kind}
        | ({"max_frames": max_frames, "fps": fps} if kind == "video" else {})
        for kind, path in in_order({"image": image, "video": video}, sys.argv)
    ]
    for part in shown:
        loaded.codes(part)  # what cannot be seen is told before anybody types
    conversation = Conversation(loaded, context, shown, system, template, sampling)
    if session is not None and session.exists():
        conversation.resume(session)
    try:
        if prompt is not None:
            conversation.ask(prompt)
        else:
            _talk(conversation, session)
    finally:  # what was read took its time
        if session is not None:
            conversation.keep(session)


def _talk(conversation: "Conversation", session: Path | None) -> None:
    """Questions and answers until the user leaves."""
    say("Ask something. /reset starts anew, /exit or Ctrl-D leaves.")
    while (line := _read_line()) is not None:
        match line.strip():
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/reset" if session is not None:
                say(f"{session} keeps this conversation; leave, and begin another --session.")
            case "/reset":
                conversation.reset()
                say("The conversation starts anew.")
            case question:
                try:
                    conversation.ask(question)
                except CapacityError as error:  # the session can go on with a shorter one
                    say(f"{error}; or start anew with /reset")
                except KeyboardInterrupt:
                    say("(stopped)")


class Conversation:
    """Turns so far; documents go before the first question, pictures and videos behind it, as the
    original asks.

    Args:
        shown: pictures and videos, as parts of a message.
    """

    def __init__(
        self,
        model: "Model",
        context: str,
        shown: list[dict[str, Any]],
        system: str | None,
        template: str,
        how: SamplingFlags,
    ) -> None:
        self._model, self._context, self._shown = model, context, shown
        self._template, self._how = template, how
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[dict[str, Any]] = []

    def reset(self) -> None:
        self._turns = []

    def resume(self, session: Path) -> None:
        """Goes on with what a file kept."""
        from lwm.generation.session import load_session

        self._turns = [dict(message) for message in load_session(session, self._model)]
        self._opening = []  # it is among the turns

    def keep(self, session: Path) -> None:
        from lwm.generation.session import save_session

        if not self._turns:  # nothing has been asked
            return
        save_session(session, self._model, [*self._opening, *self._turns])
        say(f"({session} keeps this conversation)")

    def ask(self, question: str) -> None:
        """Streams the answer to standard output; the turn counts only if it ends."""
        content: Any = question
        if self._context and not self._turns:
            content = f"{self._context}\n\n{question}"
        if self._shown and not self._turns:
            content = [{"type": "text", "text": content}, *self._shown]
        turns = [*self._turns, {"role": "user", "content": content}]
        pieces = self._model.chat(
            [*self._opening, *turns], stream=True, template=self._template, **self._how.settings()
        )
        text = print_stream(pieces)
        self._turns = [*turns, {"role": "assistant", "content": text}]
        say(f"({self._model.timings})")


def _read_line() -> str | None:
    """A line from the user; None at the end of input. The sign to type goes to standard error."""
    try:
        return console.input("> ") if sys.stdin.isatty() else input()
    except EOFError:
        return None
