"""Check `lwm data world`: what it writes for each kind, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Run
from random_vqgan import save_random_vqgan

from lwm.curation.world import drawing, writing
from lwm.data.text.tokenizer import read_tokenizer, train_tokenizer
from lwm.generation.codec import load_vqgan
from lwm.media.images import read_image, to_unit
from lwm.models.vqgan import VQGANConfig

CODES = 16  # of a frame
SIZES = VQGANConfig(
    image_size=64, patch_size=16, hidden_channels=4, channel_multipliers=(1,), residual_blocks=1,
    latent_channels=4, codebook_size=64, code_channels=3, scalar_levels=(4, 4, 4), norm_groups=2,
    local_encoder=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_vqgan(tmp_path_factory.mktemp("vqgan") / "tiny", SIZES)


@pytest.mark.parametrize(("kind", "frames"), [("images", 1), ("videos", 8), ("long-videos", 16)])
def test_examples_draw_from_captions_and_answer_questions(
    run: Run, tmp_path: Path, vqgan: Path, kind: str, frames: int
) -> None:
    def write(name: str, *options: object) -> list[dict[str, Any]]:
        out = tmp_path / name
        ran = run("data", "world", kind, out, "--count", 40, "--vqgan", vqgan, *options)
        assert ran.code == 0, ran.err
        assert ran.out == f"{out}\n"
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]

    first = write("first.jsonl")
    assert first == write("again.jsonl")
    assert first != write("other.jsonl", "--seed", 1)
    assert first != write("held-out.jsonl", "--held-out")
    assert len(first) == 40
    drawings = [record for record in first if record["fields"] == "[prompt],vision"]
    assert 15 < len(drawings) < 38
    lengths = {"image": CODES, "video": frames * CODES}
    for record in drawings:
        opening, what, caption = re.split("USER: Generate an? (image|video) of ", record["prompt"])
        assert opening == "You are a helpful assistant. "
        assert len(record["vision"]) == lengths[what]
        assert any(thing in caption for thing in drawing.THINGS)
        assert caption.endswith(" ASSISTANT:")
    # A video begins with an image of its caption.
    kinds = {len(record["vision"]) // CODES for record in drawings}
    assert kinds == ({1} if kind == "images" else {1, frames})
    # Some pictures that are asked about come from lossy files; they carry no loss.
    asked = [record for record in first if record not in drawings]
    assert all(len(record["vision"]) == frames * CODES for record in asked)
    shown = [record["fields"].split(",")[1] for record in asked]
    assert set(shown) == {"vision", "[vision]"}
    for record in asked:
        fields = [field.strip("[]") for field in record["fields"].split(",")]
        assert fields[1] == "vision"
        assert set(fields) - {"<|eos|>"} == set(record) - {"fields"}
        assert fields.count("<|eos|>") == 3
        before, after = record[fields[0]], record[fields[2]]
        # As the chat template writes a message with its parts in either order.
        if fields[0] == "opening":
            assert before == "You are a helpful assistant. USER: "
            assert re.fullmatch(r"\n.+\? ASSISTANT:", after)
        else:
            assert re.fullmatch(r"You are a helpful assistant. USER: .+\?\n", before)
            assert after == " ASSISTANT:"
    assert {record["fields"].split(",")[0] for record in asked} == {"[opening]", "[question0]"}


def test_pictures_are_frames_and_what_a_vqgan_is_trained_on(
    run: Run, tmp_path: Path, vqgan: Path
) -> None:
    out = tmp_path / "pictures"
    assert run("data", "world", "pictures", out, "--count", 3).code == 0
    names = sorted(path.name for path in out.iterdir())
    assert names[:3] == ["000000.png", "000001.png", "000002.png"]
    assert len(names) == 3 + 256
    assert all(name.startswith("held-out-") for name in names[3:])
    pixels = np.stack([read_image(out / name, None) for name in names])
    assert pixels.shape == (259, 64, 64, 3)
    # Each picture has a background, and nearly each a thing before it.
    corners = np.array(list(drawing.BACKGROUNDS.values()))
    known = (pixels[..., None, :] == corners).all(-1).any(-1)
    assert (known.mean(axis=(1, 2)) > 0.3).all()
    assert (known.mean(axis=(1, 2)) < 1).mean() > 0.9
    assert load_vqgan(vqgan).encode(to_unit(pixels[:4])).shape == (4, 4, 4)


@pytest.mark.parametrize(
    ("kind", "shortest", "length"), [("lists", 48, 90), ("texts", 128, 700), ("texts", 128, 9000)]
)
def test_texts_are_of_the_length_that_is_asked_for(
    run: Run, tmp_path: Path, kind: str, shortest: int, length: int
) -> None:
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    tokenizer = train_tokenizer(["the special magic number is in the garden of a day"] * 3, 300)
    tokenizer.save(directory)
    out = tmp_path / "texts.jsonl"
    command = ("data", "world", kind, out, "--count", 12, "--tokenizer", directory, "--length")
    refused = run(*command, shortest - 1)
    assert refused.code == 2
    assert f"--length is {shortest - 1}; it must be at least {shortest}" in refused.err
    assert not out.exists()
    ran = run(*command, length)
    assert ran.code == 0, ran.err
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 12
    for record in records:
        text = "".join(value for key, value in record.items() if key != "fields")
        assert len(tokenizer.encode(text)) <= length
        if kind == "lists":
            assert f"Repeat: {record['answer']} ASSISTANT" in record["prompt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pictures", "{out}", "--count", 0), "--count is 0; it must be at least 1"),
        (("texts", "{out}"), "add --tokenizer"),
        (
            ("pictures", "{out}", "--held-out"),
            "--held-out is of images and videos, not of pictures",
        ),
        (("texts", "{out}", "--tokenizer", "{out}"), "does not exist"),
        (("images", "{out}"), "add --vqgan"),
        (("videos", "{out}", "--vqgan", "{out}"), "no such file"),
        (("pictures", "{there}"), "exists"),
        (("sounds", "{out}"), "sounds"),
    ],
)
def test_what_cannot_be_written_is_refused(
    run: Run, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    (tmp_path / "there").mkdir()
    names = {"{out}": tmp_path / "out", "{there}": tmp_path / "there"}
    ran = run("data", "world", *(names.get(str(x), x) for x in arguments))
    assert ran.code == 2
    assert re.search(message, ran.err), ran.err
    assert "Traceback" not in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_tokenizer_has_words_digits_and_marks(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_TOKENIZER_SCENES", 800)
    out = tmp_path / "tokenizer"
    assert run("data", "world", "tokenizer", out).code == 0
    tokenizer = read_tokenizer(out)
    assert tokenizer.vocab_size == 2048
    marks = tokenizer.encode_controlled("<vision></vision>")
    assert marks == [2046, 2047]
    assert len(tokenizer.encode("<vision></vision>", specials=False)) > 2  # a user's are text
    words = " elephant on the left background: 4711"
    assert len(tokenizer.encode(words, specials=False)) <= 11
    for thing in drawing.THINGS:
        assert len(tokenizer.encode(f" {thing}", specials=False)) <= 5
