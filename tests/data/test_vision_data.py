"""Check images and videos in training data: frames, dropped prompts, weights by halves, and the
refusal of codes that do not fit the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import ids, loader, take, tokenizer, write_lines

from lwm.core.errors import ConfigError, InputError
from lwm.data.examples.examples import Example
from lwm.data.examples.fields import FieldsEncoder
from lwm.data.rows import broken as broken_module
from lwm.data.rows.packing import LossWeights, Packing, Position, Row, open_rows, pack_rows
from lwm.data.sources.array_record import write_array_record
from lwm.models.vision_tokens import VisionVocabulary

SMALL = VisionVocabulary(codes=16, codes_per_frame=4, size=24)
TEXT = 300  # ids of text in the model
VISION_MODEL: dict[str, Any] = {"vocab_size": TEXT, "vision": SMALL}


def video(*frames: int) -> list[int]:
    """Return the codes of frames, each of one code four times."""
    return [code for frame in frames for code in [frame] * 4]


def encode(fields: str, record: dict[str, Any], *, drop: bool = False, **settings: Any) -> Example:
    encoder = FieldsEncoder(tokenizer=tokenizer(), fields=fields, vision=SMALL, **settings)
    made = encoder(record, 1, drop_prompt=drop)
    assert made is not None
    return made


def frames_of(example: Example) -> list[int]:
    frames = example.tokens[example.vision].reshape(-1, 5)
    assert frames[:, 4].tolist() == [16] * (len(frames) - 1) + [17]
    return frames[:, 0].tolist()


@pytest.mark.parametrize(
    ("most", "expected"),
    [(0, [*range(10)]), (10, [*range(10)]), (4, [0, 3, 6, 9]), (3, [0, 4, 9]), (1, [0])],
)
def test_long_videos_give_evenly_spaced_frames(most: int, expected: list[int]) -> None:
    record = {"vision": video(*range(10))}
    assert frames_of(encode("vision", record, max_frames=most)) == expected


def test_vision_ids_follow_text_ids(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"caption": "a red apple", "vision": video(3)}])
    batch = next(loader(path, fields="[caption],vision", packing="pad", **VISION_MODEL))
    expected = [0, *ids("a red apple"), *ids("<vision>"), *[TEXT + 3] * 4, TEXT + 17]
    expected += [*ids("</vision>"), 1]
    assert [0, *batch["targets"][0][: len(expected) - 1].tolist()] == expected
    trained = batch["targets"][0][batch["weights"][0] > 0].tolist()
    assert trained == expected[1 + len(ids("a red apple")) :]


RECORD = {"caption": "a red apple", "vision": video(1, 2), "answer": "yes"}


@pytest.mark.parametrize("settings", [{}, {"prepend_text": "Draw: "}, {"add_bos": False}])
def test_dropped_prompt_leaves_only_vision(settings: dict[str, Any]) -> None:
    dropped = encode("[caption],vision", RECORD, drop=True, **settings)
    alone = encode("vision", RECORD)
    assert dropped.tokens.tolist() == alone.tokens.tolist()
    assert dropped.weights.tolist() == alone.weights.tolist()
    explicit = encode(
        "<|bos|>,[caption],vision,<|eos|>", RECORD, drop=True, add_eos=False, **settings
    )
    assert explicit.tokens.tolist() == alone.tokens.tolist()


@pytest.mark.parametrize(
    "fields", ["[vision],answer", "caption,vision", "answer", "vision+answer"]
)
def test_fields_with_text_loss_keep_the_prompt(fields: str) -> None:
    dropped, whole = encode(fields, RECORD, drop=True), encode(fields, RECORD)
    assert dropped.tokens.tolist() == whole.tokens.tolist()


def test_prompts_are_dropped_with_the_probability(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"caption": "a red apple", "vision": video(3)}] * 7)
    settings: dict[str, Any] = {"fields": "[caption],vision", "packing": "pad", **VISION_MODEL}

    def dropped(probability: float, seed: int = 0, count: int = 20) -> np.ndarray:
        batches = take(loader(path, drop_prompt=probability, seed=seed, **settings), count)
        second = np.array([batch["tokens"][:, 1] for batch in batches])
        return second == ids("<vision>")[0]

    assert not dropped(0.0).any()
    assert dropped(1.0).all()
    some = dropped(0.25, count=100)
    assert 0.18 < some.mean() < 0.32
    assert (some[:20] == dropped(0.25)).all()
    assert (some[:20] != dropped(0.25, seed=1)).any()
    batches = loader(path, drop_prompt=0.25, **settings)
    with pytest.raises(InputError, match=r"drop_prompt 0.25 and this run has 0.0"):
        loader(path, **settings).set_state(batches.get_state())


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([*video(1), 1], r"line 1: the key 'vision' holds 5 codes, which is not a multiple of 4"),
        (video(16), r"line 1: the key 'vision' holds the code 16, outside 0 to 15"),
    ],
)
def test_codes_of_another_codebook_are_refused(
    tmp_path: Path, codes: list[int], message: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"vision": codes}])
    with pytest.raises(InputError, match=message):
        loader(path, fields="vision", **VISION_MODEL)


def test_broken_image_is_logged_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(broken_module, "say", logged.append)
    lines = [{"vision": video(1)}, {"vision": [1, 2, 3]}, {"vision": video(2)}]
    path = write_lines(tmp_path / "a.jsonl", lines)
    take(loader(path, fields="vision", max_broken=0.5, **VISION_MODEL), 3)
    assert [line.split(": ", 1)[1] for line in logged] == [
        f"{path}, line 2: the key 'vision' holds 3 codes, which is not a multiple of 4, "
        "the codes of a frame"
    ]


def test_text_model_refuses_vision_codes(tmp_path: Path) -> None:
    record = {"vision": video(1), "fields": "vision"}
    path = write_lines(tmp_path / "a.jsonl", [record])
    with pytest.raises(ConfigError, match=r"'vision'.*text model.*--add-vision"):
        loader(path, fields="vision", vocab_size=TEXT)
    with pytest.raises(InputError, match=r"line 1: it has vision codes, but the model is"):
        loader(path, fields_from_example="fields", vocab_size=TEXT)


def test_tokenized_images_are_checked(tmp_path: Path) -> None:
    def written(name: str, *vision_ids: int) -> Path:
        tokens = np.array([5, *vision_ids], np.int32)
        example = Example(
            tokens=tokens,
            weights=np.ones(len(tokens), np.float32),
            vision=np.arange(len(tokens)) > 0,
        )
        write_array_record(tmp_path / name, [example])
        return tmp_path / name

    frames = [7, 8, 9, 15, 16, 3, 2, 1, 0, 17]  # codes below 16, four a frame
    batch = next(loader(written("good.array_record", *frames), packing="pad", **VISION_MODEL))
    assert batch["tokens"][0, :10].tolist() == [5, *(TEXT + n for n in frames[:-1])]
    assert batch["targets"][0, :10].tolist() == [TEXT + n for n in frames]
    for name, vision_ids, message in (
        (
            "outside",
            [24, 8, 9, 15, 17],
            "vision id 24, outside the model's vision vocabulary of 24",
        ),
        ("short", [7, 8, 17], r"line 1: its 3 vision ids are not a multiple of 5"),
        ("unended", [7, 8, 9, 15, 16], "encode them with the model's VQGAN"),
        ("unused", [7, 8, 20, 15, 17], "frames of 4 codes below 16"),
    ):
        with pytest.raises(InputError, match=message):
            loader(written(f"{name}.array_record", *vision_ids), **VISION_MODEL)


def original_weights(targets: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Return the weight of each target of rows [rows, seq] in the original's loss: the mean over
    rows of half the mean over text targets plus half the mean over vision targets."""
    result = np.zeros(targets.shape)
    for row in range(len(targets)):
        for kind in (targets[row] < TEXT, targets[row] >= TEXT):
            valid = trained[row] * kind
            result[row] += 0.5 * valid / max(valid.sum(), 1e-10) / len(targets)
    return result


KINDS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30)
"""Whether each token of an example is vision, and whether it carries loss."""


def rows_of(
    examples: list[Example], packing: Packing, weights: LossWeights, count: int
) -> list[Row]:
    rows = pack_rows(
        lambda number: examples[number % len(examples)],
        Position(),
        length=32,
        packing=packing,
        loss_weights=weights,
        text_vocab=TEXT,
    )
    return [next(rows)[0] for _ in range(count)]


def mixed(kinds: list[tuple[bool, bool]]) -> Example:
    vision, trained = (np.array(column) for column in zip(*kinds, strict=True))
    trained[-1] = True
    tokens = np.arange(len(kinds), dtype=np.int32) % 16
    return Example(tokens=tokens, weights=trained.astype(np.float32), vision=vision)


@given(st.lists(KINDS, min_size=1, max_size=6))
def test_halves_equal_the_original_loss(
    columns: list[list[tuple[bool, bool]]],
) -> None:
    """Check the weights up to the division: the original divides by rows, ours by their sum."""
    examples = [mixed(kinds) for kinds in columns]
    for packing, weights in (
        ("pad", "halves"),
        ("pad", "row_halves"),
        ("concatenate", "halves"),
        ("concatenate", "row_halves"),
        ("pack", "row_halves"),
    ):
        rows = rows_of(examples, packing, weights, 3)  # type: ignore[arg-type]
        plain = rows_of(examples, packing, "token", 3)  # type: ignore[arg-type]
        batch, trained = (
            np.stack([row[name] for row in of])
            for of, name in ((rows, "weights"), (plain, "weights"))
        )
        targets = np.stack([row["targets"] for row in rows])
        expected = original_weights(targets, trained)
        np.testing.assert_allclose(batch / 3, expected, rtol=1e-6)
        both = [((r < TEXT) & (w > 0)).any() and ((r >= TEXT) & (w > 0)).any()
                for r, w in zip(targets, trained, strict=True)]  # fmt: skip
        if all(both):  # then the figures are the same too
            assert batch.sum() == pytest.approx(3)


@given(st.lists(KINDS, min_size=1, max_size=6))
def test_packed_halves_equal_padded_halves(
    columns: list[list[tuple[bool, bool]]],
) -> None:
    examples = [mixed(kinds) for kinds in columns]

    def segments(rows: list[Row]) -> set[tuple[Any, ...]]:
        return {
            tuple(
                tuple(row[name][row["segments"] == segment].tolist())
                for name in ("tokens", "targets", "weights", "positions")
            )
            for row in rows
            for segment in set(row["segments"].tolist()) - {-1}
        }

    padded = segments(rows_of(examples, "pad", "halves", len(examples)))
    assert segments(rows_of(examples, "pack", "halves", open_rows(32))) == padded
