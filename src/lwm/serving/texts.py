"""Answer conversations and continue prompts: `/v1/chat/completions` and `/v1/completions`."""

import asyncio
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar

from lwm.core.errors import InputError
from lwm.engine.request import Request
from lwm.engine.scoring import TokenScores
from lwm.serving.host import Host, Piece
from lwm.serving.schemas import ChatBody, CompletionBody, TextBody

_MEDIA = ("image_url", "video_url")


class Reply(ABC):
    """Represent the response to one request: one or several choices, whole or in events."""

    prefix: ClassVar[str]
    kinds: ClassVar[tuple[str, str]]  # `object` of the whole response and of an event
    continued: ClassVar[bool]

    def __init__(self, host: Host, body: TextBody, requests: Sequence[Request]) -> None:
        self._host, self._body, self._requests = host, body, requests
        self._header = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": host.name,
        }

    @abstractmethod
    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return a choice of the whole response."""

    @abstractmethod
    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return a choice of the event of one piece."""

    def opening(self) -> list[dict[str, Any]]:
        """Return the choices of the events that come before any token."""
        return []

    async def whole(self) -> dict[str, Any]:
        """Return the response when all its choices are complete."""
        pieces: list[list[Piece]] = [[] for _ in self._requests]
        async for index, piece in self._pieces():
            pieces[index].append(piece)
        choices = [self.choice(index, some) for index, some in enumerate(pieces)]
        tokens = sum(piece.token is not None for some in pieces for piece in some)
        header = {**self._header, "object": self.kinds[0]}
        return {**header, "choices": choices, "usage": self._usage(tokens)}

    async def events(self) -> AsyncIterator[str]:
        """Iterate over the data of the events of a stream."""
        for choice in self.opening():
            yield self._event([choice])
        tokens = 0
        async for index, piece in self._pieces():
            tokens += piece.token is not None
            if piece.text or piece.token is not None or piece.finish is not None:
                yield self._event([self.delta(index, piece)])
        options = self._body.stream_options
        if options is not None and options.include_usage:
            yield self._event([], usage=self._usage(tokens))
        yield "[DONE]"

    def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        return self._host.answers(self._requests, self._body.stop, continued=self.continued)

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return json.dumps({**self._header, "object": self.kinds[1], "choices": choices, **more})

    def _usage(self, answered: int) -> dict[str, int]:
        asked = sum(len(request.prompt) for request in self._requests[:: self._body.n])
        return {
            "prompt_tokens": asked,
            "completion_tokens": answered,
            "total_tokens": asked + answered,
        }

    def _name(self, token: int) -> str:
        """Return a token's text, or its piece of the vocabulary where it has none of its own."""
        text = self._host.tokenizer.decode([token])
        if text and "\ufffd" not in text:
            return text
        return self._host.tokenizer.backend.id_to_token(token) or str(token)


class ChatReply(Reply):
    """Answer a conversation."""

    prefix, kinds, continued = "chatcmpl", ("chat.completion", "chat.completion.chunk"), False
    _body: ChatBody

    @classmethod
    async def open(cls, host: Host, body: ChatBody) -> "ChatReply":
        """Encode the conversation, its images and videos on another thread than the engine's."""
        messages = [_checked(message) for message in body.messages]
        prompt = await asyncio.to_thread(host.chat_prompt, messages)
        requests = host.text_requests(
            prompt, body,
            max_tokens=body.max_tokens or body.max_completion_tokens,
            logprobs=max(1, body.top_logprobs) if body.logprobs else 0,
        )  # fmt: skip
        return cls(host, body, requests)

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(pieces),
            "finish_reason": pieces[-1].finish,
        }

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(len(self._requests))
        ]

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs([piece]),
            "finish_reason": piece.finish,
        }

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        count = self._body.top_logprobs
        return {
            "content": [
                {
                    **self._scored(piece.token.token, piece.token.logprob),
                    "top_logprobs": [self._scored(*pair) for pair in piece.token.top[:count]],
                }
                for piece in pieces
                if piece.token is not None and piece.token.token is not None
            ],
            "refusal": None,
        }

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._name(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class CompletionReply(Reply):
    """Continue prompts."""

    prefix, kinds, continued = "cmpl", ("text_completion", "text_completion"), True
    _body: CompletionBody

    @classmethod
    async def open(cls, host: Host, body: CompletionBody) -> "CompletionReply":
        """Encode the prompts, and score them if they are echoed with log-probabilities."""
        prompts = [await asyncio.to_thread(_ids, host, prompt) for prompt in body.prompts]
        logprobs = 0 if body.logprobs is None else max(1, body.logprobs)
        requests: list[Request] = []
        for prompt in prompts:
            requests += host.text_requests(
                prompt, body, max_tokens=max(1, body.max_tokens), logprobs=logprobs
            )
        reply = cls(host, body, requests)
        reply._scores = [None] * len(prompts)
        if body.echo and body.logprobs is not None:
            for index, prompt in enumerate(prompts):
                if len(prompt) > 1:
                    scores = await asyncio.to_thread(host.score, prompt, max(1, body.logprobs))
                    reply._scores[index] = scores
        return reply

    _scores: list[TokenScores | None]

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        if self._body.max_tokens:
            async for item in super()._pieces():
                yield item
            return
        for index in range(len(self._requests)):  # only the prompt is echoed
            yield index, Piece("", None, "length")

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        echoed = self._echo(index)
        return {
            "index": index,
            "text": echoed + text,
            "logprobs": self._logprobs(index, pieces, echoed=self._body.echo),
            "finish_reason": pieces[-1].finish,
        }

    def opening(self) -> list[dict[str, Any]]:
        if not self._body.echo:
            return []
        return [
            {
                "index": index,
                "text": self._echo(index),
                "logprobs": self._logprobs(index, [], echoed=True),
                "finish_reason": None,
            }
            for index in range(len(self._requests))
        ]

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        return {
            "index": index,
            "text": piece.text,
            "logprobs": self._logprobs(index, [piece], echoed=False),
            "finish_reason": piece.finish,
        }

    def _echo(self, index: int) -> str:
        return self._host.tokenizer.decode(self._requests[index].prompt) if self._body.echo else ""

    def _logprobs(
        self, index: int, pieces: Sequence[Piece], *, echoed: bool
    ) -> dict[str, Any] | None:
        count = self._body.logprobs
        if count is None:
            return None
        rows: list[tuple[int, float | None, dict[str, float] | None]] = []
        if echoed:
            prompt, scores = self._requests[index].prompt, self._scores[index // self._body.n]
            rows.append((prompt[0], None, None))
            for place, token in enumerate(prompt[1:]):
                assert scores is not None
                top = zip(scores.top_tokens[0, place], scores.top_logprobs[0, place], strict=True)
                best = {self._name(int(t)): float(p) for t, p in list(top)[:count]}
                rows.append((token, float(scores.log_likelihood[0, place]), best))
        for token in (piece.token for piece in pieces):
            if token is not None and token.token is not None:
                best = {self._name(t): p for t, p in token.top[:count]}
                rows.append((token.token, token.logprob, best))
        lengths = [len(self._host.tokenizer.decode([token])) for token, _, _ in rows]
        return {
            "tokens": [self._name(token) for token, _, _ in rows],
            "token_logprobs": [logprob for _, logprob, _ in rows],
            "top_logprobs": [best for _, _, best in rows],
            "text_offset": list(accumulate(lengths[:-1], initial=0)) if rows else [],
        }


def _ids(host: Host, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        if not prompt:
            raise InputError("the prompt is empty; give some text to continue")
        return host.tokenizer.encode(prompt, specials=True)
    return prompt


def _checked(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuse what would be ignored, and sources that are not in the request itself."""
    for name in ("tool_calls", "function_call", "audio", "tool_call_id"):
        if message.get(name):
            raise InputError(f"{name} in a message is not supported; leave it out")
    if message.get("role") == "tool":
        raise InputError("messages of the role 'tool' are not supported; leave them out")
    content = message.get("content")
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            continue
        if kind not in _MEDIA:
            raise InputError(
                f"a part of type {kind!r} is not supported; send text, image_url or video_url"
            )
        source = part.get(kind)
        url = source.get("url") if isinstance(source, Mapping) else source
        if not isinstance(url, str) or not url.startswith("data:"):
            shown = repr(url)[:60]
            raise InputError(
                f"{kind} is {shown}; send the contents as a data: URL, because nothing is fetched"
            )
    return message
