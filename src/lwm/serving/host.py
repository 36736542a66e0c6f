"""Hold what all endpoints share: the model, its worker, and answers as they arrive."""

import asyncio
import json
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lwm.core.errors import CapacityError
from lwm.data.text.tokenizer import Tokenizer
from lwm.engine.request import Request, Token
from lwm.engine.sampling import Sampling
from lwm.engine.scoring import Scorer, TokenScores
from lwm.generation.model import Model
from lwm.generation.text_generation import StopFilter
from lwm.generation.vision_prompts import require_vision
from lwm.serving.schemas import TextBody
from lwm.serving.worker import EngineWorker

_LOGGED = 2000  # characters of a prompt; pictures are longer


@dataclass(frozen=True)
class Piece:
    """Represent what one token adds to an answer.

    Args:
        token: None where the end only releases text that was kept.
        finish: why the answer ends here; None if it does not.
    """

    text: str
    token: Token | None
    finish: str | None


class Host:
    """Hold a model that is being served.

    Args:
        name: the model's id in the API.
        load: loads the model.
        slots, context: of the engine; a context of 0 is the model's.
        queue: requests that may wait.
        log_prompt: is called with what each request asks, as JSON; None keeps prompts private.

    Attributes:
        requests: of the API that are being answered.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Model],
        *,
        slots: int,
        context: int,
        queue: int,
        log_prompt: Callable[[str], None] | None = None,
    ) -> None:
        self.name, self._log_prompt = name, log_prompt
        self.requests = 0
        self._load, self._slots, self._context = load, slots, context
        self.worker = EngineWorker(self._make_engine, limit=queue)
        self._scoring = threading.Lock()  # one text at a time, beside the engine

    def _make_engine(self) -> Any:
        self.model = self._load()
        self.tokenizer: Tokenizer = self.model.tokenizer
        self.context = min(self._context or 8192, self.model.config.generation_length)
        self._scorer = Scorer(self.model.weights, self.model.config, self.model.mesh)
        return self.model.new_engine(self._slots, self.context)

    def note(self, asked: Any) -> None:
        """Log what a request asks, if that is wanted."""
        if self._log_prompt is not None:
            # As JSON, so that no text can look like another line of the log.
            self._log_prompt(json.dumps(asked, ensure_ascii=False)[:_LOGGED])

    def require_room(self, prompt: int, answer: int) -> None:
        """Raise CapacityError if a prompt and an answer exceed the context."""
        if prompt + answer > self.context:
            raise CapacityError(
                f"the prompt has {prompt:,} tokens and the context is {self.context:,}, with at "
                f"least {answer} for the answer; shorten the prompt"
            )

    def require_frames(self, prompt: str, frames: int) -> None:
        """Raise CapacityError if a video of so many frames exceeds the context."""
        vision = require_vision(self.model.config)
        tokens = len(self.tokenizer.encode(prompt)) + frames * vision.tokens_per_frame
        if tokens > self.context:
            raise CapacityError(
                f"{frames} frames of {vision.tokens_per_frame} tokens and the prompt make more "
                f"than {tokens:,} and the context is {self.context:,}; ask for fewer frames"
            )

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the ids of a conversation; blocks while its images and videos are encoded."""
        self.model.require_room(messages, max_tokens=1)
        return self.model.chat_tokens(messages)

    def text_requests(
        self, prompt: Sequence[int], body: TextBody, *, max_tokens: int | None, logprobs: int
    ) -> list[Request]:
        """Build one request for each choice; choices have the seeds after the first."""
        self.require_room(len(prompt), 1)
        room = self.context - len(prompt)
        seed = secrets.randbits(32) if body.seed is None else body.seed
        return [
            Request(
                prompt=prompt,
                max_tokens=min(max_tokens or room, room),
                sampling=Sampling(
                    temperature=body.temperature,
                    top_k=body.top_k,
                    top_p=max(body.top_p, 1e-6),  # 0 keeps the likeliest token only, as this does
                    min_p=body.min_p,
                    repetition_penalty=body.repetition_penalty,
                    presence_penalty=body.presence_penalty,
                    frequency_penalty=body.frequency_penalty,
                    seed=(seed + choice) % 2**32,
                ),
                stop_tokens=self.tokenizer.eos,
                logprobs=logprobs,
            )
            for choice in range(body.n)
        ]

    def score(self, tokens: Sequence[int], top: int) -> TokenScores:
        """Compute the likelihoods of a prompt's tokens; blocks, so call it on another thread."""
        import numpy as np

        with self._scoring:
            return self._scorer.log_likelihoods(np.array([tokens], np.int32), top=top)

    async def answers(
        self, requests: Sequence[Request], stops: Sequence[str], *, continued: bool
    ) -> AsyncIterator[tuple[int, Piece]]:
        """Iterate over the pieces of several answers, each with the index of its request.

        Closing the iterator, as a client that leaves does, ends the requests.

        Args:
            continued: whether an answer continues the text of its prompt without a break.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Any]]()

        def deliver(index: int) -> Callable[[Any], None]:
            def put(event: Any) -> None:
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

            return put

        tickets = self.worker.submit(requests, [deliver(index) for index in range(len(requests))])
        after = [request.prompt if continued else () for request in requests]
        texts = [_Text(self.tokenizer, stops, tokens) for tokens in after]
        running = set(range(len(requests)))
        try:
            while running:
                index, event = await events.get()
                if isinstance(event, Exception):
                    raise event
                if index not in running:  # it stopped while its last tokens were on the way
                    continue
                piece = texts[index].push(event)
                if piece.finish is not None:
                    running.discard(index)
                    tickets[index].cancel()
                yield index, piece
        finally:
            for ticket in tickets:
                ticket.cancel()


class _Text:
    """Turn the tokens of an answer into text up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], after: Sequence[int]) -> None:
        self._decoder, self._stop = tokenizer.stream_decoder(after), StopFilter(stops)

    def push(self, token: Token) -> Piece:
        text = "" if token.token is None else self._stop.push(self._decoder.push(token.token))
        finish = "stop" if self._stop.stopped else token.finish
        if finish is not None and not self._stop.stopped:
            text += self._stop.push(self._decoder.finish())
            text += "" if self._stop.stopped else self._stop.finish()
            finish = "stop" if self._stop.stopped else finish
        return Piece(text, None if token.token is None else token, finish)
