"""Check cards in videos: what they show, where they are inserted, how answers are judged."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from lwm.core.errors import CapacityError, InputError
from lwm.core.params import initialize
from lwm.data.text.tokenizer import Tokenizer
from lwm.evaluation.results import Results
from lwm.evaluation.task import Case, evaluate
from lwm.evaluation.tasks.cards import (
    COLORS,
    Card,
    CardKind,
    card_of,
    paint,
    synthetic_frames,
)
from lwm.evaluation.tasks.video_needle import VideoNeedleTask, haystack_codes
from lwm.generation.codec import VqganCodec
from lwm.media.videos import write_video
from lwm.models.llama import LlamaConfig
from lwm.models.vision_tokens import VisionVocabulary
from lwm.models.vqgan import VQGANConfig, vqgan_params

VISION = VisionVocabulary(size=2048, codes=2000, codes_per_frame=4)
CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2,
    num_kv_heads=2, head_dim=16, max_sequence_length=1024, vision=VISION,
)  # fmt: skip
ROUNDS = 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    import tokenizers
    from tokenizers import decoders, pre_tokenizers
    from tokenizers.models import BPE

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0} | {text: i + 1 for i, text in enumerate(letters)}
    backend = tokenizers.Tokenizer(BPE(vocab=vocabulary, merges=[]))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = byte_level  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend=backend, bos="<s>", eos=())


def task_of(
    tokenizer: Tokenizer, frames: Sequence[int], depths: Sequence[float]
) -> VideoNeedleTask:
    """Make a task: frame i of the video has the code i four times, card r the code 1900 + r."""
    video = np.repeat(np.arange(max(frames) - 1, dtype=np.int32)[:, None], 4, axis=1)
    cards = np.repeat(np.arange(1900, 1900 + ROUNDS, dtype=np.int32)[:, None], 4, axis=1)
    return VideoNeedleTask(
        tokenizer=tokenizer, config=CONFIG, video=video, cards=cards, frames=frames,
        depths=depths, seed=3,
    )  # fmt: skip


def shown(case: Case) -> tuple[list[int], list[int]]:
    """Return the first code of each frame of a prompt, and the tokens that end the frames."""
    codes = [token - CONFIG.vocab_size for token in case.prompt if token >= CONFIG.vocab_size]
    return codes[::5], codes[4::5]


@given(frames=st.integers(1, 90), depth=st.floats(0, 100), number=st.integers(0, ROUNDS - 1))
def test_the_card_is_inserted_at_its_depth(
    tokenizer: Tokenizer, frames: int, depth: float, number: int
) -> None:
    task = task_of(tokenizer, [frames, 90], [depth])
    case = task.case({"frames": frames, "depth_percent": depth, "seed": 3 + number})
    firsts, ends = shown(case)
    assert len(firsts) == frames
    assert ends == [VISION.end_of_frame] * (frames - 1) + [VISION.end_of_video]
    place = firsts.index(1900 + number)
    assert abs(place - depth / 100 * (frames - 1)) <= 0.5
    assert case.columns["place"] == place + 1
    assert [*firsts[:place], *firsts[place + 1 :]] == list(range(frames - 1))
    words = bytes(tokenizer.decode([t for t in case.prompt if t < 300]), "utf-8").decode()
    assert words == (
        f"You are a helpful assistant. USER: {card_of(3 + number).question}\n<vision></vision> "
        "ASSISTANT:"
    )
    assert tokenizer.decode(list(case.target)) == card_of(3 + number).answer == case.reference


class Scripted:
    """Answer by the code that belongs to a card."""

    def restart(self) -> None:
        pass

    def answer(self, cases: Sequence[Case]) -> Iterator[str]:
        for case in cases:
            (number,) = [code - 1900 for code in shown(case)[0] if code >= 1900]
            yield f"It is {card_of(3 + number).answer.upper()}."

    def follow(self, cases: Sequence[Case]) -> Iterator[list[bool]]:
        for case in cases:
            yield [True] * (len(case.target) - (case.reference == "4")) + [False] * (
                case.reference == "4"
            )


def test_right_answers_score_everything(tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = task_of(tokenizer, [1, 8, 40], [0.0, 30.0, 100.0])
    columns = ("frames", "depth_percent", "seed")
    rows = evaluate(task, Scripted(), Results(tmp_path / "oracle", {}, columns))
    assert len(rows) == 3 * 3 * ROUNDS
    assert all(row["score"] == 1 for row in rows)
    followed = evaluate(
        task, Scripted(), Results(tmp_path / "logits", {}, columns), score="logits"
    )
    assert [row["score"] for row in followed] == [float(r["answer"] != "4") for r in followed]


def test_random_answers_score_at_chance_level() -> None:
    draw, counts = np.random.default_rng(0), {"color": 8, "shape": 5, "digit": 8, "count": 8}
    words = {"color": list(COLORS), "digit": list("23456789"), "count": list("23456789")}
    words["shape"] = ["circle", "square", "triangle", "star", "cross"]
    for seed in range(4):
        card = card_of(seed)
        hits = [card.judge(str(draw.choice(words[card.kind]))) for _ in range(2000)]
        assert abs(np.mean(hits) - 1 / counts[card.kind]) < 0.035  # four deviations


def test_answers_are_judged_by_their_words() -> None:
    card = card_of(0)
    verdicts: list[tuple[CardKind, str, bool]] = [
        ("color", "red", True), ("color", "The star is RED.", True), ("color", "", False),
        ("color", "red, orange, yellow, green", False), ("color", "a star", False),
        ("color", "It is colored.", False), ("color", "redder", False),
        ("shape", "A red star!", True), ("shape", "stars", False), ("shape", "square", False),
        ("digit", "4", True), ("digit", "Four.", True), ("digit", "14", False),
        ("digit", "4 or 5", False), ("digit", "It is the one with a 4", True),
        ("count", "There are four red dots", True), ("count", "forty", False),
        ("count", "4 dots, four", True),
    ]  # fmt: skip
    for kind, response, right in verdicts:
        asked = replace(card, kind=kind, color="red", shape="star", digit="4")
        assert asked.judge(response) == right, (kind, response)


def blobs(mask: np.ndarray) -> int:
    _, count = ndimage.label(mask)  # type: ignore[misc]
    return int(count)


def test_cards_show_what_their_question_is_about() -> None:
    cards = [card_of(seed) for seed in range(64)]
    assert [card.kind for card in cards[:5]] == ["color", "shape", "digit", "count", "color"]
    assert cards == [card_of(seed) for seed in range(64)]
    many = {card_of(seed).answer for seed in range(400)}
    assert many == {*COLORS, "star", "circle", "square", "triangle", "cross", *"23456789"}
    for card in cards:
        pixels = paint(card, 64)
        assert pixels.shape == (64, 64, 3)
        inside = pixels[4:-4, 4:-4]
        ink = np.abs(inside.astype(int) - COLORS[card.color]).max(axis=-1) < 8
        assert 0.02 < ink.mean() < 0.6, card
        assert (inside.min(axis=-1) > 250).mean() > 0.3, card  # white
        count = blobs(np.abs(inside.astype(int) - 255).max(axis=-1) > 60)
        assert count == (int(card.digit) if card.kind == "count" else 1), card
    # One image for each answer, apart from where dots lie and how cards are colored.
    black = [paint(Card(kind="digit", color="black", shape="star", digit=d, seed=0), 32)
             for d in "23456789"]  # fmt: skip
    distances = [np.abs(a.astype(int) - b).mean() for a in black for b in black if a is not b]
    assert min(distances) > 8


def test_the_synthetic_video_has_scenes_and_no_cards() -> None:
    frames = np.stack(list(synthetic_frames(60, 32)))
    np.testing.assert_array_equal(frames[:30], list(islice(synthetic_frames(30, 32), 30)))
    changes = np.abs(np.diff(frames.astype(int), axis=0)).mean(axis=(1, 2, 3))
    cuts = {23, 47}
    assert set(np.flatnonzero(changes > 3 * np.median(changes))) == cuts
    assert (np.delete(changes, list(cuts)) > 0.1).all()
    assert (frames.min(axis=-1) > 240).mean() == 0


def test_frames_of_a_video_are_encoded_or_refused(tmp_path: Path) -> None:
    settings = VQGANConfig(
        image_size=8, hidden_channels=4, channel_multipliers=(1, 1, 1), residual_blocks=1,
        latent_channels=4, codebook_size=16, code_channels=4, norm_groups=2,
    )  # fmt: skip
    codec = VqganCodec(
        settings, initialize(vqgan_params(settings), jax.random.key(0), jnp.float32)
    )
    file = tmp_path / "short.mp4"
    write_video(file, np.stack(list(synthetic_frames(12, 16))), fps=4.0)  # three seconds
    assert haystack_codes(codec, 3, file).shape == (3, 4)
    whole = haystack_codes(codec, 12, file, fps=4.0)
    np.testing.assert_array_equal(haystack_codes(codec, 5, file, fps=4.0), whole[:5])
    with pytest.raises(InputError, match=r"short\.mp4 gives 3 frames .* needs 5"):
        haystack_codes(codec, 5, file)
    made = haystack_codes(codec, 40, None)
    expected = codec.encode(np.stack(list(synthetic_frames(40, 8))) / np.float32(127.5) - 1)
    np.testing.assert_array_equal(made, expected.reshape(40, 4))


def test_impossible_tasks_are_refused(tokenizer: Tokenizer) -> None:
    task = task_of(tokenizer, [90], [0.0])
    long = replace(task, video=np.zeros((199, 4), np.int32))
    with pytest.raises(CapacityError, match=r"200 frames .* at most \d+ --frames") as refused:
        replace(long, frames=[91, 200])
    most = int(str(refused.value).split("at most ")[1].split()[0])
    fits = replace(long, frames=[most])
    longest = max(
        len(fits.case(key).prompt) + fits.max_tokens for unit in fits.units() for key in unit
    )
    assert CONFIG.max_sequence_length - VISION.tokens_per_frame < longest
    assert longest <= CONFIG.max_sequence_length
    with pytest.raises(InputError, match=r"89 frames .* 99"):
        replace(task, frames=[100])
    with pytest.raises(InputError, match="text model"):
        replace(task, config=replace(CONFIG, vision=None))
