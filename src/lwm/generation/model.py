"""Define `Model`, which `lwm.load` returns: weights with a tokenizer and a codec."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from typing import Any, Literal, overload

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8

from lwm.checkpoints.add_vision import require_codebook
from lwm.core.config import check_arguments
from lwm.core.errors import CapacityError, ConfigError, InputError
from lwm.data.text.templates import TURN_ENDS, Message, choose_template, render
from lwm.data.text.tokenizer import Tokenizer
from lwm.engine.engine import Engine
from lwm.engine.request import Request
from lwm.engine.runner import weights_for
from lwm.engine.scoring import Logits, Scorer, require_ids
from lwm.generation.codec import ImageCodec, decode_frames
from lwm.generation.frames import EarlierFrames, FrameDone, default_sampling, video_codes
from lwm.generation.media_inputs import count_part_frames, encode_media
from lwm.generation.text_generation import (
    Timings,
    answer_end,
    stream_tokens,
    text_request,
    until_stop,
)
from lwm.generation.vision_prompts import (
    Part,
    as_array,
    chat_length,
    chat_tokens,
    has_vision,
    integer_array,
    require_text,
    require_vision,
)
from lwm.models.llama import Llama, LlamaConfig
from lwm.models.quantized import QUANTIZED_ROWS
from lwm.models.vision_tokens import single_table_ids
from lwm.models.vqgan import VQGANConfig

_SHORTEN = "shorten the prompt"


class Model:
    """Generate and score with a loaded model. `lwm.generation.load.load` makes it.

    Args:
        source: the name it was loaded by, for messages.
        open_tokenizer, open_codec: open what the checkpoint or the user provides, on first use.
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
        self.timings = Timings()  # of the last answer
        self._open_tokenizer, self._open_codec = cache(open_tokenizer), cache(open_codec)
        self._engine: Engine | None = None
        self._dequantized: Llama | None = None

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.weights, self.config, self.mesh)

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer, which is opened on first use.

        Raises:
            ConfigError: there is none.
            CheckpointError: it is broken, or of an unknown kind.
        """
        tokenizer = self._open_tokenizer()
        if tokenizer is None:
            raise ConfigError(
                f"{self.source} has no tokenizer, and text needs one; add --tokenizer (in Python: "
                "tokenizer=) with a tokenizer.json, a tokenizer.model or a directory of one"
            )
        return tokenizer

    @property
    def codec(self) -> ImageCodec:
        """Return the codec of images, which is opened on first use; it can be replaced.

        Raises:
            InputError: this is a text model.
            ConfigError: there is no VQGAN, or its codes are not the model's.
            CheckpointError: the VQGAN is broken.
        """
        require_vision(self.config)
        codec = self._open_codec()
        if codec is None:
            raise ConfigError(
                f"{self.source} has no VQGAN, which turns images into codes and back; add "
                "--vqgan (in Python: vqgan=) with the one it was trained with"
            )
        return codec

    @codec.setter
    def codec(self, codec: ImageCodec) -> None:
        if isinstance(codec.config, VQGANConfig):
            require_codebook(codec.config, "given", self.config, self.source)
        self._open_codec = lambda: codec

    @check_arguments
    def codes(self, part: Part) -> Int[np.ndarray, "frames codes_per_frame"]:
        """Compute the codes of an image or a video in a part of a message (see `chat`).

        Raises:
            InputError: this is a text model, or the image or video cannot be read.
            ConfigError: there is no VQGAN.
        """
        require_vision(self.config)
        return encode_media(part, lambda: self.codec)

    def logits(self, tokens: Any, *, vision_mask: Any = None) -> Logits:
        """Compute the logits of the next token at every position of whole sequences.

        Args:
            tokens: ids, [batch, seq]; no tokenizer is needed.
            vision_mask: which of the tokens are vision ids, counted from 0; defaults to none.

        Raises:
            InputError: the tokens are not a rectangle of ids of the vocabulary, or the mask has
                another shape.
            CapacityError: the sequences exceed the model's context.
        """
        vision, vocab_size = self.config.vision, self.config.vocab_size
        ids = integer_array(tokens, "tokens", "batch, seq")
        mask = np.zeros(ids.shape, bool) if vision_mask is None else as_array(vision_mask)
        if vision_mask is not None and vision is None:
            raise InputError(f"{self.source} is a text model; leave out vision_mask")
        if mask.shape != ids.shape or mask.dtype != bool:
            raise InputError(
                f"vision_mask has shape {list(mask.shape)} and type {mask.dtype}; true or false "
                f"for each of the tokens {list(ids.shape)} is needed"
            )
        if ids.size == 0:
            raise InputError(f"tokens have shape {list(ids.shape)}; at least one is needed")
        require_ids(ids[~mask], vocab_size, "tokens")
        if vision is not None:
            require_ids(ids[mask], vision.size, "vision tokens")
        self._require_context(ids.shape[-1])
        logits = self._scorer.logits(single_table_ids(ids, mask, vocab_size))
        if vision is None:
            return Logits(text=logits)
        return Logits(text=logits[..., :vocab_size], vision=logits[..., vocab_size:])

    @overload
    def generate(
        self,
        prompt: str,
        *,
        stream: Literal[False] = False,
        special: bool = False,
        **settings: Any,
    ) -> str: ...

    @overload
    def generate(
        self, prompt: str, *, stream: Literal[True], special: bool = False, **settings: Any
    ) -> Iterator[str]: ...

    @check_arguments
    def generate(
        self, prompt: str, *, stream: bool = False, special: bool = False, **settings: Any
    ) -> str | Iterator[str]:
        """Continue a text.

        Args:
            stream: return an iterator over pieces of text instead of the whole text.
            special: whether control tokens spelled in the prompt, such as `</s>`, are these
                tokens instead of text.
            settings: `max_tokens` (256), `temperature` (0), `top_k`, `top_p`, `min_p`,
                `repetition_penalty`, `seed` as in `Sampling`, and `stop`, strings that end the
                answer.

        Raises:
            InputError: the prompt is empty.
            ConfigError: a setting is unknown or out of range.
            CapacityError: the prompt exceeds the context, or its cache the memory.
        """
        if not prompt.strip():
            raise InputError("the prompt is empty; give some text to continue")
        encode = self.tokenizer.encode_controlled if special else self.tokenizer.encode
        tokens = encode(prompt, specials=True)
        return self._answer(tokens, stream, settings, after=tokens)

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = False, **settings: Any
    ) -> str: ...

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **settings: Any
    ) -> Iterator[str]: ...

    @check_arguments
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: bool = False,
        template: str = "auto",
        **settings: Any,
    ) -> str | Iterator[str]:
        """Answer the last message of a conversation.

        The cache keeps earlier turns. Each call encodes the images and videos in its messages; to
        encode a video once, call `codes` and send a part `{"type": "codes", "codes": codes}`.

        Args:
            messages: in OpenAI's shape; content is text, or a list of parts, each of which is text
                or an image or a video (see `media_inputs.encode_media`).
            template: `auto` (the checkpoint's; the original's if it has none, or if there are
                images), `original` or `chatml`.
            settings: as for `generate`.

        Raises:
            InputError: a message is malformed, or has images and this is a text model.
            ConfigError: a setting is unknown or out of range.
            CapacityError: the conversation exceeds the context, or its cache the memory.
        """
        template = self._template_name(messages, template)
        if template in TURN_ENDS:
            settings["stop"] = (*answer_end(settings).stops, TURN_ENDS[template])
        if self._with_vision(messages):
            self.require_room(messages, template=template, **settings)
        return self._answer(self.chat_tokens(messages, template=template), stream, settings)

    @check_arguments
    def chat_tokens(self, messages: Sequence[Message], *, template: str = "auto") -> list[int]:
        """Return a conversation as the ids that `chat` answers; images and videos are encoded."""
        chosen = choose_template(self._template_name(messages, template), self.tokenizer)
        if self._with_vision(messages):
            return chat_tokens(chosen, messages, self.tokenizer, self.config, self.codes)
        return self._text_tokens(chosen, messages)

    @check_arguments
    def require_room(
        self, messages: Sequence[Message], *, template: str = "auto", **settings: Any
    ) -> None:
        """Raise what `chat` raises about a conversation, before any image or video is encoded."""
        chosen = choose_template(self._template_name(messages, template), self.tokenizer)
        if not self._with_vision(messages):
            self._request(self._text_tokens(chosen, messages), settings)
            return
        length = chat_length(chosen, messages, self.tokenizer, self.config, count_part_frames)
        self._request(range(length), settings, remedy="show fewer frames or images")

    def _with_vision(self, messages: Sequence[Message]) -> bool:
        return self.config.vision is not None and has_vision(messages)

    def _template_name(self, messages: Sequence[Message], template: str) -> str:
        # The form of the training data for images.
        return "original" if template == "auto" and self._with_vision(messages) else template

    def _text_tokens(self, template: str, messages: Sequence[Message]) -> list[int]:
        require_text(messages, self.source)
        return self.tokenizer.encode_controlled(render(template, messages, self.tokenizer))

    def _request(
        self, prompt: Sequence[int], settings: Mapping[str, Any], remedy: str = _SHORTEN
    ) -> tuple[Request, Engine]:
        """Build a request, and an engine with room for it; refuse what exceeds the context."""
        self._require_context(len(prompt), answer=1, remedy=remedy)
        request = text_request(prompt, settings, self.tokenizer, self.config.generation_length)
        return request, self.engine_for(len(prompt), request.max_tokens)

    def _answer(
        self, tokens: list[int], stream: bool, settings: dict[str, Any], after: Sequence[int] = ()
    ) -> str | Iterator[str]:
        """Generate text; `after` is the text that it continues without a break."""
        request, engine = self._request(tokens, settings)
        self.timings = Timings(prompt=len(tokens))
        answer = stream_tokens(engine, request, self.timings)
        text = self.tokenizer.decode_stream(answer, after=after)
        pieces = until_stop(text, answer_end(settings).stops)
        return pieces if stream else "".join(pieces)

    @check_arguments
    def image(
        self,
        prompt: str,
        *,
        count: int | None = None,
        negative_prompt: str | None = None,
        frame_done: FrameDone | None = None,
        **settings: Any,
    ) -> UInt8[np.ndarray, "*count height width 3"]:
        """Generate an image from a prompt, or `count` images at once.

        Args:
            count: number of images; defaults to one, without a leading axis.
            negative_prompt: what guidance leads away from; defaults to an empty prompt.
            frame_done: called with the codes of each finished image.
            settings: of `Sampling`; defaults to the model's (`frames.default_sampling`).

        Raises:
            InputError: the prompt is empty, or this is a text model.
            ConfigError: a setting is unknown or out of range.
            CapacityError: the context or the memory is too small.
        """
        images = self.video(
            prompt, frames=1, count=1 if count is None else count, negative_prompt=negative_prompt,
            frame_done=frame_done, **settings,
        )[:, 0]  # fmt: skip
        return images[0] if count is None else images

    @check_arguments
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
        """Generate a video from a prompt, or `count` videos at once.

        The first frame is generated as an image, unless there are earlier frames.

        Args:
            frames: of the whole video, earlier ones included.
            before: earlier frames to continue: codes [1 or count, frames, codes_per_frame], or an
                image or a video as a part of a message (see `chat`).
            settings: of `Sampling`; defaults to the model's (`frames.default_sampling`).

        Other arguments and errors are those of `image`.
        """
        codec = self.codec
        if isinstance(before, Mapping):
            part = before
            before = EarlierFrames(count_part_frames(part), lambda: self.codes(part)[None])
        first, later = default_sampling(self.config)
        codes = video_codes(
            self.engine_for, self.config, self.tokenizer, prompt, frames=frames,
            count=1 if count is None else count, before=before, negative_prompt=negative_prompt,
            sampling=later.updated(settings), first_sampling=first.updated(settings),
            frame_done=frame_done,
        )  # fmt: skip
        videos = decode_frames(codec, codes)
        return videos[0] if count is None else videos

    def restart(self, tokens: int) -> None:
        """Discard the cached tokens and reserve a cache of `tokens` positions.

        Later answers then do not depend on earlier requests, to the last bit: the cached part of a
        prompt decides in which chunks the rest is computed, and so how sums round.
        """
        self.engine_for(tokens, 1).scheduler.forget()

    def engine_for(self, prompt: int, max_tokens: int, slots: int = 1) -> Engine:
        """Return the engine, made on first use, with a cache for a prompt and its answer.

        An engine with too few slots, or with more than twice as many, is replaced, because empty
        slots cost time in every step.
        """
        if self._engine is None or not 1 <= self._engine.slots / self._engine.rounded(slots) <= 2:
            self._engine = None  # its cache is freed before another is made
            self._engine = self.new_engine(slots, prompt + max_tokens)
        self._engine.require(prompt, max_tokens)
        return self._engine

    def new_engine(self, slots: int, tokens: int) -> Engine:
        """Make an engine for requests of `tokens` positions, with headroom for longer ones.

        All engines of a model share one dequantized copy of quantized weights.
        """
        weights = self.weights if slots <= QUANTIZED_ROWS else self._dequantized
        if weights is None:
            weights = self._dequantized = weights_for(self.weights, slots)
        return Engine(
            weights, self.config, slots=slots, tokens=tokens, headroom=True, dtype=self.dtype,
            mesh=self.mesh, alone=self.weights,
        )  # fmt: skip

    def _require_context(self, length: int, answer: int = 0, remedy: str = _SHORTEN) -> None:
        limit = self.config.generation_length if answer else self.config.max_sequence_length
        if length + answer > limit:
            note = ", the answer included" if answer else ""
            if limit < self.config.max_sequence_length:
                note += ", because dynamic RoPE scaling changes the keys of longer texts"
            raise CapacityError(
                f"the prompt has {length:,} tokens and the context of {self.source} is {limit:,}"
                f"{note}; {remedy} or use a model of longer context"
            )
