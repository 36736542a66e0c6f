"""What `lwm.load` returns: a model with its tokenizer, ready to score, continue, converse, draw.

Puts the rooms below together for one user; it holds no logic of its own that they
could hold.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, Literal, overload

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8

from lwm.checkpoints.add_vision import require_codebook
from lwm.core.errors import CapacityError, ConfigError, InputError
from lwm.core.progress import progress
from lwm.data.text.templates import TURN_ENDS, Message, choose_template, render
from lwm.data.text.tokenizer import Tokenizer
from lwm.engine.engine import Engine
from lwm.engine.request import Request
from lwm.engine.runner import weights_for
from lwm.engine.sampling import Sampling
from lwm.engine.scoring import Logits, Scorer, require_ids
from lwm.generation.frames import IMAGE, VIDEO, FrameDone, require_vision
from lwm.generation.media_inputs import MediaEncoder
from lwm.generation.stop_strings import until_stop
from lwm.generation.timings import Timings
from lwm.generation.vision_generation import (
    ImageCodec,
    decode_frames,
    image_codes,
    sampling_from,
    video_codes,
)
from lwm.generation.vision_prompts import Part, See, chat_tokens, has_vision, text_of
from lwm.models.llama import Llama, LlamaConfig
from lwm.models.quantized import QUANTIZED_ROWS
from lwm.models.vision_tokens import single_table_ids
from lwm.models.vqgan import VQGANConfig


class Model:
    """A loaded model. Made by `lwm.generation.load.load`.

    Args:
        source: the name it was loaded by, for messages.
    """

    def __init__(
        self,
        *,
        source: str,
        config: LlamaConfig,
        weights: Llama,
        open_tokenizer: Callable[[], Tokenizer | None],
        open_codec: Callable[[], ImageCodec | None] = lambda: None,
        dtype: str,
        mesh: Mesh | None,
    ) -> None:
        self.source, self.config, self.dtype, self.mesh = source, config, dtype, mesh
        self.weights = weights
        self._open_tokenizer, self._open_codec = open_tokenizer, open_codec
        self._tokenizer: Tokenizer | None = None
        self._scorer: Scorer | None = None
        self._engine: Engine | None = None
        self._codec: ImageCodec | None = None
        self._dequantized: Llama | None = None
        self._see: See = MediaEncoder(lambda: self.codec)
        self.timings = Timings()

    @property
    def tokenizer(self) -> Tokenizer:
        """Opened on first use, so that what needs no text needs no tokenizer.

        Raises:
            ConfigError: the checkpoint has none and none was given.
            CheckpointError: it is broken, or of an unknown kind.
        """
        if self._tokenizer is None:
            self._tokenizer = self._open_tokenizer()
        if self._tokenizer is None:
            raise ConfigError(
                f"{self.source} has no tokenizer, and text needs one; add --tokenizer (in Python: "
                "tokenizer=) "
                "with a tokenizer.json, a tokenizer.model or a directory that holds one"
            )
        return self._tokenizer

    @property
    def codec(self) -> ImageCodec:
        """Turns pictures into codes and back; opened on first use, or set to another.

        Raises:
            InputError: the model does not see.
            ConfigError: it brings no VQGAN and none was given, or one of other codes.
            CheckpointError: the VQGAN is broken.
        """
        require_vision(self.config)
        if self._codec is None:
            self._codec = self._open_codec()
        if self._codec is None:
            raise ConfigError(
                f"{self.source} brings no VQGAN, which turns pictures into codes and back; add "
                "--vqgan (in Python: vqgan=) with the one it was trained with"
            )
        return self._codec

    @codec.setter
    def codec(self, codec: ImageCodec) -> None:
        if isinstance(codec.config, VQGANConfig):
            require_codebook(codec.config, "given", self.config, self.source)
        self._codec = codec

    def codes(self, part: Part) -> Int[np.ndarray, "frames codes_per_frame"]:
        """Codes of a picture or a video, a part of a message as `chat` takes them.

        Raises:
            InputError: the model does not see, or what is shown cannot be read.
            ConfigError: it has no VQGAN.
        """
        require_vision(self.config)
        return self._see(part)

    def logits(self, tokens: Any, *, vision_mask: Any = None) -> Logits:
        """Scores of the next token at every position of whole sequences.

        Args:
            tokens: ids, [batch, seq]; needs no tokenizer.
            vision_mask: for a model that sees, which of the tokens are ids of vision, counted
                from 0 as codes are; none of them unless given.

        Raises:
            InputError: not a rectangle of ids of the vocabulary, or a mask of another shape.
            CapacityError: longer than the model's context.
        """
        vision = self.config.vision
        if vision_mask is not None and vision is None:
            raise InputError(
                f"{self.source} is a text model and takes no vision_mask; leave it out"
            )
        try:
            ids = np.asarray(tokens)
        except ValueError:  # rows of different lengths
            ids = np.array([])
        if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(
                f"tokens have shape {list(ids.shape)} and type {ids.dtype}; whole numbers [batch, "
                "seq] are needed, at least one"
            )
        mask = np.zeros(ids.shape, bool) if vision_mask is None else np.asarray(vision_mask)
        if mask.shape != ids.shape or mask.dtype != bool:
            raise InputError(
                f"vision_mask has shape {list(mask.shape)} and type {mask.dtype}; true or false "
                f"for each of the tokens {list(ids.shape)} is needed"
            )
        require_ids(ids[~mask], self.config.vocab_size, "tokens")
        if vision is not None:
            require_ids(ids[mask], vision.size, "tokens of vision")
        self._require_context(ids.shape[-1])
        if self._scorer is None:
            self._scorer = Scorer(self.weights, self.config, self.mesh)
        logits = self._scorer.logits(single_table_ids(ids, mask, self.config.vocab_size))
        if vision is None:
            return Logits(text=logits)
        text, seen = np.split(logits, [self.config.vocab_size], axis=-1)
        return Logits(text=text, vision=seen)

    @overload
    def generate(self, prompt: str, *, stream: Literal[False] = False, **settings: Any) -> str: ...

    @overload
    def generate(
        self, prompt: str, *, stream: Literal[True], **settings: Any
    ) -> Iterator[str]: ...

    def generate(
        self, prompt: str, *, stream: bool = False, **settings: Any
    ) -> str | Iterator[str]:
        """Continues a text.

        Args:
            stream: give pieces of text as they come instead of the whole.
            settings: `max_tokens` (256), `temperature` (0), `top_k`, `top_p`, `min_p`,
                `repetition_penalty`, `seed` as in `Sampling`, and `stop`, strings that end the
                answer.

        Raises:
            InputError: the prompt is empty.
            CapacityError: the prompt is longer than the context, or its cache does not fit into
                memory.
        """
        if not prompt.strip():
            raise InputError("the prompt is empty; give some text to continue")
        tokens = self.tokenizer.encode(prompt)
        return self._answer(tokens, stream, settings, continues=True)

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = False, **settings: Any
    ) -> str: ...

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **settings: Any
    ) -> Iterator[str]: ...

    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: bool = False,
        template: str = "auto",
        **settings: Any,
    ) -> str | Iterator[str]:
        """Answers the last message of a conversation.

        What earlier turns left in the cache is used again, so a long document is read once.

        Args:
            messages: OpenAI's shape; content is text, or a list of parts of which each is text or
                a picture or a video (see `media_inputs.MediaEncoder`).
            template: `auto` (the original's where something is shown, or the checkpoint brings
                none, else its own), `original` or `chatml`.
            settings: as for `generate`.

        Raises:
            InputError: a message is malformed, or brings images to a model that cannot see.
            CapacityError: the conversation is longer than the context, or its cache does not fit
                into memory.
        """
        seeing = self.config.vision is not None and has_vision(messages)
        if seeing and template == "auto":  # in these words `lwm tokenize` teaches to see
            template = "original"
        chosen = choose_template(template, self.tokenizer)
        if seeing:
            tokens = chat_tokens(chosen, messages, self.tokenizer, self.config, self._see)
        else:
            plain = [{**m, "content": text_of(m, source=self.source)} for m in messages]
            text = render(chosen, plain, self.tokenizer)
            tokens = self.tokenizer.encode(text, specials=False)
        if template in TURN_ENDS:
            stop = settings.get("stop", ())
            given = (stop,) if isinstance(stop, str) else tuple(stop)
            settings["stop"] = (*given, TURN_ENDS[template])
        return self._answer(tokens, stream, settings)

    def image(
        self,
        prompt: str,
        *,
        count: int | None = None,
        negative_prompt: str | None = None,
        frame_done: FrameDone | None = None,
        **settings: Any,
    ) -> UInt8[np.ndarray, "*count height width 3"]:
        """A picture of a prompt, or `count` of them, drawn together.

        Args:
            count: how many; unless given one, without an axis in front.
            negative_prompt: what guidance leads away from; anything unless given.
            frame_done: told of each picture's codes as it is done.
            settings: of `Sampling`, for others than the original's (`frames.IMAGE`).

        Raises:
            InputError: the prompt is empty, or the model does not see.
            CapacityError: the context or the memory is too small.
        """
        codec = self.codec
        codes = image_codes(
            self.engine_for, self.config, self.tokenizer, prompt, count=_number(count),
            negative_prompt=negative_prompt, sampling=sampling_from(IMAGE, settings),
            frame_done=frame_done,
        )  # fmt: skip
        drawn = decode_frames(codec, codes)[:, 0]
        return drawn[0] if count is None else drawn

    def video(
        self,
        prompt: str,
        *,
        frames: int = 8,
        count: int | None = None,
        before: Any = None,
        negative_prompt: str | None = None,
        frame_done: FrameDone | None = None,
        **settings: Any,
    ) -> UInt8[np.ndarray, "*count frames height width 3"]:
        """A video of a prompt, or `count` of them, drawn together; the first frame as an image,
        unless given.

        Args:
            frames: of the whole video, earlier ones included.
            count: how many; unless given one, without an axis in front.
            before: codes of earlier frames to go on from, [1 or count, frames, codes_per_frame].
            negative_prompt, frame_done: as for `image`.
            settings: of `Sampling`, for others than the original's (`frames.IMAGE` for a first
                frame, `frames.VIDEO` behind it).

        Raises:
            InputError: the prompt is empty, or the model does not see.
            CapacityError: the context or the memory is too small.
        """
        codec = self.codec
        codes = video_codes(
            self.engine_for, self.config, self.tokenizer, prompt, frames=frames,
            count=_number(count),
            before=before, negative_prompt=negative_prompt,
            sampling=sampling_from(VIDEO, settings),
            first_sampling=sampling_from(IMAGE, settings), frame_done=frame_done,
        )  # fmt: skip
        drawn = decode_frames(codec, codes)
        return drawn[0] if count is None else drawn

    def restart(self, tokens: int) -> None:
        """Forgets what the cache holds and makes room for `tokens`.

        What follows then depends on nothing that came before, to the last bit: how much of a
        prompt is still held decides in what pieces the rest is computed, hence how sums round.

        Raises:
            CapacityError: the cache does not fit into memory.
        """
        self.engine_for(tokens, 1).scheduler.forget()

    def engine_for(self, prompt: int, max_tokens: int, slots: int = 1) -> Engine:
        """The engine, made on first use, with a cache that holds a prompt and its answer.

        One with too few slots, or far too many, makes way for another: empty slots cost time in
        every step, and two caches side by side memory.
        """
        if self._engine is None or not 1 <= self._engine.slots / self._engine.rounded(slots) <= 2:
            self._engine = None  # its cache goes before another comes
            self._engine = self.new_engine(slots, prompt + max_tokens)
        self._engine.require(prompt, max_tokens)
        return self._engine

    def new_engine(self, slots: int, tokens: int) -> Engine:
        """Make an engine for requests of up to `tokens` tokens, with headroom for longer ones.

        All engines of a model share one dequantized copy of quantized weights.

        Raises:
            CapacityError: the cache or the dequantized weights do not fit into memory.
        """
        weights = self.weights if slots <= QUANTIZED_ROWS else self._dequantized
        if weights is None:
            weights = self._dequantized = weights_for(self.weights, slots)
        return Engine(
            weights, self.config, slots=slots, tokens=tokens, headroom=True, dtype=self.dtype,
            mesh=self.mesh,
        )  # fmt: skip

    def _require_context(self, length: int, answer: int = 0) -> None:
        limit = self.config.max_sequence_length
        if length + answer > limit:
            raise CapacityError(
                f"the prompt has {length:,} tokens and the context of {self.source} is {limit:,}"
                f"{', the answer included' if answer else ''}; shorten the prompt or take a model "
                "of longer context"
            )

    def _answer(
        self, tokens: list[int], stream: bool, settings: dict[str, Any], continues: bool = False
    ) -> str | Iterator[str]:
        stop = settings.pop("stop", ())
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        # A stop string that is a token of its own never shows in the text.
        own = [self.tokenizer.backend.token_to_id(text) for text in stops]
        max_tokens = settings.pop("max_tokens", 256)
        if max_tokens < 1:
            raise ConfigError(f"max_tokens is {max_tokens}; it must be at least 1")
        sampling = sampling_from(Sampling(temperature=0.0), settings)
        self._require_context(len(tokens), answer=1)
        request = Request(
            prompt=tokens,
            max_tokens=min(max_tokens, self.config.max_sequence_length - len(tokens)),
            sampling=sampling,
            stop_tokens=(*self.tokenizer.eos, *(token for token in own if token is not None)),
        )
        engine = self.engine_for(len(tokens), request.max_tokens)
        answer = self._tokens(engine, request)
        text = self.tokenizer.decode_stream(answer, after=tokens if continues else ())
        pieces = until_stop(text, stops)
        return pieces if stream else "".join(pieces)

    def _tokens(self, engine: Engine, request: Request) -> Iterator[int]:
        """Token ids of the answer, counted and timed."""
        figures = self.timings = Timings(prompt=len(request.prompt))
        reused = engine.scheduler.reused
        started = time.perf_counter()
        with progress("reading the prompt", len(request.prompt)) as advance:
            events = engine.stream(request, advance)
            first = next(events)
        figures.prefill_seconds = time.perf_counter() - started
        figures.reused = engine.scheduler.reused - reused
        started = time.perf_counter()
        with closing(events):  # also when the reader of the answer stops early
            event = first
            while True:
                if event.token is not None:
                    figures.answer += 1
                    figures.answer_seconds = time.perf_counter() - started
                    yield event.token
                if event.finish is not None:
                    return
                event = next(events)


def _number(count: int | None) -> int:
    return 1 if count is None else count
