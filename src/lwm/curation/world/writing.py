"""Write the data of the world: pictures, a tokenizer, texts, and images and videos as codes."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from tokenizers import AddedToken

from lwm.core.errors import InputError
from lwm.core.files import new_directory, new_file
from lwm.core.progress import progress
from lwm.curation.world.drawing import UNSEEN_THINGS, as_in_a_file, draw
from lwm.curation.world.language import caption, partial_caption, random_question
from lwm.curation.world.scenes import Sampler, Scene
from lwm.curation.world.stories import StoryWriter
from lwm.data.text.book import king_james_chapters
from lwm.data.text.tokenizer import Tokenizer, train_tokenizer
from lwm.data.text.vision_texts import (
    CLOSING,
    generation_request,
    question_after,
    question_opening,
)
from lwm.generation.codec import VqganCodec
from lwm.generation.vision_prompts import CLOSE, OPEN
from lwm.media.images import to_unit, write_image

VOCABULARY = 2048
"""Size of the tokenizer."""
HELD_OUT_PREFIX = "held-out-"
"""Beginning of the names of pictures that a VQGAN is evaluated on."""

_HELD_OUT_PICTURES = 256
_TOKENIZER_SCENES = 4000  # of each kind, and a quarter as many documents
_BATCH = 64  # scenes that are drawn and encoded together
_QUESTIONS = 4  # about one image or video, each a turn
EXAMPLES: dict[str, Callable[[Sampler], Scene]] = {
    "images": lambda sampler: (
        sampler.pair() if sampler.random.random() < 0.35 else sampler.still()
    ),
    "videos": Sampler.clip,
    "long-videos": Sampler.sequence,
}
"""How the scenes of each kind of examples are drawn: single frames, 8 frames or 16."""
# Shares of passages, lists to repeat and documents, and the fewest tokens that hold one of each.
_TEXTS = {"lists": ((0, 1, 0), 48), "texts": ((1, 2, 5), 128)}


def write_pictures(out: Path, count: int, seed: int) -> None:
    """Write single frames to train a VQGAN on, and held-out ones, as PNG files in a directory."""
    random = Random(f"pictures {seed}")
    training, held_out = Sampler(random), Sampler(random, held_out=True)
    with new_directory(out) as directory, progress("drawing", count) as advance:
        for number in range(count + _HELD_OUT_PICTURES):
            sampler = training if number < count else held_out
            makers = (sampler.still, sampler.still, sampler.pair, sampler.video, sampler.physics)
            frame = random.choice(random.choice(makers)().frames)
            prefix = "" if number < count else HELD_OUT_PREFIX
            write_image(directory / f"{prefix}{number:06}.png", draw(frame))
            advance()


def write_tokenizer(out: Path, seed: int) -> None:
    """Train a tokenizer on the book, captions, questions and documents.

    The marks around vision codes are control tokens, one id each.
    """
    marks = [AddedToken(mark, normalized=False, special=True) for mark in (OPEN, CLOSE)]
    tokenizer = train_tokenizer(_tokenizer_texts(seed), VOCABULARY - len(marks))
    tokenizer.backend.add_special_tokens(marks)
    with new_directory(out) as directory:
        tokenizer.save(directory)


def _tokenizer_texts(seed: int) -> Iterator[str]:
    random = Random(f"tokenizer {seed}")
    sentences = book_sentences()
    yield from sentences[::4]
    sampler = Sampler(random)
    for _ in range(_TOKENIZER_SCENES):
        for scene in (sampler.still(), sampler.pair(), sampler.video(), sampler.physics()):
            asked = random_question(scene, random)
            yield generation_request(caption(scene, random), "an image")
            yield f"{asked.text}\n{asked.answer}"
    yield from UNSEEN_THINGS
    plain = train_tokenizer(sentences[:1000], 512)  # only to count
    # Few invented names, because they take the place of words in a vocabulary.
    writer = StoryWriter(
        tokenizer=plain, length=512, sentences=sentences, most_questions=8, plain_names=True
    )
    for _ in range(_TOKENIZER_SCENES // 4):
        record = writer.document(random)
        yield from (text for key, text in record.items() if key != "fields")


def book_sentences() -> list[str]:
    """Return the sentences of the King James Bible, in order."""
    text = " ".join(chapter.text for chapter in king_james_chapters())
    return re.split(r"(?<=[.?!]) ", text)


def write_texts(
    out: Path, kind: str, count: int, length: int, tokenizer: Tokenizer, seed: int
) -> None:
    """Write JSON lines of `lists` to repeat, or of `texts` of all kinds.

    Raises InputError if a length is too short.
    """
    shares, shortest = _TEXTS[kind]
    if length < shortest:
        raise InputError(f"--length is {length}; it must be at least {shortest} tokens for {kind}")
    random = Random(f"{kind} {length} {seed}")
    writer = StoryWriter(tokenizer=tokenizer, length=length, sentences=book_sentences())
    writers = (writer.passage, writer.repetition, writer.document)
    with (
        new_file(out) as partial,
        progress("writing", count) as advance,
        partial.open("w", encoding="utf-8") as file,
    ):
        for _ in range(count):
            (write,) = random.choices(writers, weights=shares)
            file.write(json.dumps(write(random)) + "\n")
            advance()


def write_examples(
    out: Path, kind: str, count: int, codec: VqganCodec, seed: int, *, held_out: bool = False
) -> None:
    """Write JSON lines of drawings and questions, as codes of a kind of `EXAMPLES`."""
    random = Random(f"{kind} {seed} {held_out}")
    sampler = Sampler(random, held_out=held_out)
    with (
        new_file(out) as partial,
        progress("encoding", count) as advance,
        partial.open("w", encoding="utf-8") as file,
    ):
        for start in range(0, count, _BATCH):
            views = [_view(kind, sampler) for _ in range(min(_BATCH, count - start))]
            for view, codes in zip(views, _encode(views, codec), strict=True):
                file.write(json.dumps(_example(view, codes, kind, random)) + "\n")
                advance()


@dataclass(frozen=True)
class _View:
    """Represent a scene, whether it is asked about, and the loss of a file that it comes from."""

    scene: Scene
    asked: bool
    loss: int | None  # a seed of `as_in_a_file`; None for exact pixels


def _view(kind: str, sampler: Sampler) -> _View:
    """Choose a scene: two in three are drawn from a caption, the others are asked about."""
    random = sampler.random
    asked = random.random() < 1 / 3
    scene = EXAMPLES[kind](sampler)
    # Pictures that people ask about and videos that they continue come from files.
    lossy = random.random() < (0.5 if asked else 0.0 if kind == "images" else 0.15)
    return _View(scene, asked, random.randrange(2**32) if lossy else None)


def _encode(views: list[_View], codec: VqganCodec) -> list[list[int]]:
    """Return the codes of all frames of each view, each different frame encoded once."""
    frames = list(dict.fromkeys((frame, v.loss) for v in views for frame in v.scene.frames))
    pixels = [
        draw(frame) if loss is None else as_in_a_file(draw(frame), loss) for frame, loss in frames
    ]
    rows = codec.encode(to_unit(np.stack(pixels)), batch=_BATCH).reshape(len(frames), -1).tolist()
    codes = dict(zip(frames, rows, strict=True))
    return [[code for frame in v.scene.frames for code in codes[frame, v.loss]] for v in views]


def _example(view: _View, codes: list[int], kind: str, random: Random) -> dict[str, Any]:
    """Return a record of a drawing, or of questions and answers."""
    scene = view.scene
    if not view.asked:
        words = caption(scene, random) if random.random() < 0.8 else partial_caption(scene, random)
        # A video is drawn from an image of its caption on, as the original draws it.
        first = kind != "images" and random.random() < 0.25
        request = generation_request(words, "an image" if kind == "images" or first else "a video")
        frame = len(codes) // len(scene.frames)
        codes = codes[:frame] if first else codes
        return {"fields": "[prompt],vision", "prompt": request, "vision": codes}
    asked = [random_question(scene, random) for _ in range(_QUESTIONS)]
    record: dict[str, Any] = {"vision": codes}
    # An exact picture carries loss as well: a model also learns from what it only looks at.
    shown = "vision" if view.loss is None else "[vision]"
    if random.random() < 0.5:
        fields = ["[question0]", shown, "[closing]", "answer0"]
        record |= {"question0": question_opening(asked[0].text), "closing": CLOSING}
    else:  # clients send the parts of a message in either order
        fields = ["[opening]", shown, "[question0]", "answer0"]
        record["opening"], record["question0"] = question_after(asked[0].text)
    for number, question in enumerate(asked):
        if number:
            record[f"question{number}"] = f" USER: {question.text} ASSISTANT:"
            fields += ["<|eos|>", f"[question{number}]", f"answer{number}"]
        record[f"answer{number}"] = question.answer
    return {"fields": ",".join(fields), **record}
