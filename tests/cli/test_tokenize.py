"""Check `lwm tokenize`: training data from a folder, reports of skipped files, interruption."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import Run
from PIL import Image
from random_vqgan import save_random_vqgan

from lwm.media.images import write_image
from lwm.media.videos import write_video
from lwm.models.vqgan import VQGANConfig

SIZES = VQGANConfig(
    image_size=8, hidden_channels=4, channel_multipliers=(1, 2, 2), residual_blocks=2,
    latent_channels=4, codebook_size=16, code_channels=3, norm_groups=2,
)  # fmt: skip
MODEL = [
    "--model.vocab-size", 300, "--model.hidden-size", 32, "--model.intermediate-size", 48,
    "--model.num-layers", 1, "--model.num-heads", 2, "--model.num-kv-heads", 2,
    "--model.vision.codes", 16, "--model.vision.size", 18, "--model.vision.codes-per-frame", 4,
    "--sequence-length", 160, "--batch-size", 2,
]  # fmt: skip


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_vqgan(tmp_path_factory.mktemp("vqgan") / "tiny", SIZES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), np.uint8)
    for number in range(8):
        write_image(folder / f"{number}.png", pixels[number])
    write_video(folder / "v.mp4", pixels, fps=8.0)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    Image.fromarray(pixels[0]).save(folder / "still.avif")
    (folder / "drawing.svg").write_text("<svg/>")
    for name in ("0", "1", "broken", "drawing", "still", "v"):
        (folder / f"{name}.txt").write_text(f"the thing {name}", encoding="utf-8")
    (folder.parent / "more.csv").write_text("file,caption\n2.png,two\n2.png,a two\n")
    return folder


def test_names_of_files_may_be_any_bytes(run: Run, tmp_path: Path, vqgan: Path) -> None:
    for name in (b"caf\xe9", b"broken\xff"):
        path = tmp_path / os.fsdecode(name + b".png")
        write_image(path, np.zeros((8, 8, 3), np.uint8))
        path.with_suffix(".txt").write_text("a thing", encoding="utf-8")
    path.write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    out = tmp_path / "out.jsonl"
    ran = run("tokenize", tmp_path, "--vqgan", vqgan, "--out", out)
    assert ran.code == 0, ran.err
    assert r"broken\udcff.png cannot be read" in ran.err
    (line,) = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert os.fsencode(line["source"]) == b"caf\xe9.png"


def test_a_folder_becomes_a_file_that_trains(run: Run, folder: Path, vqgan: Path) -> None:
    out = folder.parent / "out.jsonl"
    ran = run(
        "tokenize", folder, "--vqgan", vqgan, "--out", out, "--captions",
        folder.parent / "more.csv", "--max-frames", 5, "--batch-size", 3,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.out == f"{out}\n"
    lines = ran.err.splitlines()
    assert "broken.jpg cannot be read as an image" in lines[0]
    assert "drawing.svg is not an image that can be read" in lines[1]
    assert lines[2].startswith("skipped 2 of 12 files that cannot be read")
    assert lines[3:8] == [f"{number}.png has no caption" for number in range(3, 8)]
    assert lines[8].startswith("skipped 5 of 12 files without a caption")
    assert lines[9] == "(6 captioned images, 9 frames of 4 codes)"
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["caption"] for line in lines] == [
        "the thing 0", "the thing 1", "two", "a two", "the thing still", "the thing v",
    ]  # fmt: skip
    assert [len(line["vision"]) for line in lines] == [4, 4, 4, 4, 4, 20]
    assert " an image of" in lines[4]["drawing"]
    trained = run(
        "train", "vision-debug", "--data.path", out, "--out", folder.parent / "run", "--steps",
        2, *MODEL,
    )  # fmt: skip
    assert trained.code == 0, trained.err
    assert "broken" not in trained.err


def test_uncaptioned_images_can_be_kept(run: Run, folder: Path, vqgan: Path, tiny: Path) -> None:
    out = folder.parent / "out.array_record"
    ran = run(
        "tokenize", folder / "5.png", "--vqgan", vqgan, "--out", out, "--uncaptioned", "keep",
        "--tokenizer", tiny,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert out.is_file()


def test_a_killed_run_continues(run: Run, folder: Path, vqgan: Path) -> None:
    """Check a run that is killed by SIGKILL between two files."""
    pixels = np.random.default_rng(1).integers(0, 256, (300, 8, 8, 3), np.uint8)
    for number, image in enumerate(pixels):
        write_image(folder / f"many{number}.png", image)
    arguments = ["tokenize", folder, "--vqgan", vqgan, "--uncaptioned", "keep", "--batch-size", 1]
    whole, cut = folder.parent / "whole.jsonl", folder.parent / "cut.jsonl"
    partial = folder.parent / "cut.jsonl.partial"
    assert run(*arguments, "--out", whole).code == 0
    command = [sys.executable, "-m", "lwm", *map(str, arguments), "--out", str(cut)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            if partial.exists() and partial.read_bytes().count(b"\n") > 3:
                break
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert not cut.exists()
    done = partial.read_bytes().count(b"\n") - 1
    assert 0 < done < 300
    assert run(*arguments, "--out", cut).code == 0
    assert cut.read_bytes() == whole.read_bytes()
    assert not partial.exists()


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("gone does not exist; name a folder", ["gone", "VQGAN", "OUT"]),
        ("bare holds no images or videos", ["bare", "VQGAN", "OUT"]),
        ("nothing to look at", ["VQGAN", "OUT"]),
        ("gone: there is no such file or directory", ["FOLDER", "--vqgan", "gone", "OUT"]),
        ("there.jsonl exists", ["FOLDER", "VQGAN", "--out", "there.jsonl"]),
        ("must end in", ["FOLDER", "VQGAN", "--out", "a.txt"]),
        ("a.csv cannot be read", ["FOLDER", "VQGAN", "OUT", "--captions", "a.csv"]),
        (r"b.csv, line 2: 'x.png' is not", ["FOLDER", "VQGAN", "OUT", "--captions", "b.csv"]),
        ("fps is 0.0", ["FOLDER", "VQGAN", "OUT", "--fps", "0"]),
        ("max_frames is 0", ["FOLDER", "VQGAN", "OUT", "--max-frames", "0"]),
        ("batch_size is 0", ["FOLDER", "VQGAN", "OUT", "--batch-size", "0"]),
        ("--workers 2 needs --engine ray", ["FOLDER", "VQGAN", "OUT", "--workers", "2"]),
        ("none of 1 files has a caption", ["FOLDER/7.png", "VQGAN", "OUT"]),
        ("none of 1 files can be read", ["FOLDER/broken.jpg", "VQGAN", "OUT"]),
        ("give the tokenizer", ["FOLDER", "VQGAN", "--out", "a.array_record"]),
    ],
)
def test_mistakes_are_reported_in_one_sentence(
    run: Run,
    folder: Path,
    vqgan: Path,
    monkeypatch: pytest.MonkeyPatch,
    message: str,
    arguments: list[str],
) -> None:
    place = folder.parent
    monkeypatch.chdir(place)
    (place / "bare").mkdir()
    (place / "there.jsonl").touch()
    (place / "b.csv").write_text("file,caption\nx.png,x\n", encoding="utf-8")
    before = sorted(place.rglob("*"))
    words: list[str] = []
    for argument in arguments:
        if argument == "VQGAN":
            words += ["--vqgan", str(vqgan)]
        elif argument == "OUT":
            words += ["--out", "out.jsonl"]
        else:
            words.append(argument.replace("FOLDER", str(folder)))
    ran = run("tokenize", *words)
    assert (ran.code, ran.out) == (2, "")
    assert re.fullmatch(r"lwm: [^\n]+\n", ran.err)
    assert re.search(message, ran.err)
    assert sorted(place.rglob("*")) == before
