"""Check generating and reading images on the command line, with a random model and VQGAN."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Run
from random_vqgan import save_random_vqgan

from lwm.generation.codec import VqganCodec
from lwm.media.images import read_image, write_image
from lwm.media.videos import read_video, write_video
from lwm.models.vqgan import VQGANConfig

CODES, SIZE = 16, 8
GENERATE = ("--top-k", 5, "--prompt", "a cat")


def make_vqgan(directory: Path, codes: int = CODES) -> Path:
    config = VQGANConfig(
        image_size=SIZE, hidden_channels=4, channel_multipliers=(1, 1, 1), residual_blocks=1,
        latent_channels=4, codebook_size=codes, code_channels=4, norm_groups=2,
    )  # fmt: skip
    return save_random_vqgan(directory, config)


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vqgan(tmp_path_factory.mktemp("codec") / "vqgan")


@pytest.fixture
def multimodal(run: Run, tiny: Path, vqgan: Path, tmp_path: Path) -> Path:
    """Convert the tiny text model, with a vision table and the VQGAN."""
    done = run("convert", tiny, tmp_path / "vision-model", "--add-vision", "--vqgan", vqgan)
    assert done.code == 0, done.err
    return tmp_path / "vision-model"


def test_images_are_numbered_and_previewed(run: Run, multimodal: Path, tmp_path: Path) -> None:
    out, preview = tmp_path / "cat.png", tmp_path / "preview"
    done = run(
        "generate",
        "image",
        multimodal,
        *GENERATE,
        "--out",
        out,
        "--count",
        2,
        "--preview",
        preview,
    )
    assert done.code == 0, done.err
    paths = [tmp_path / "cat-1.png", tmp_path / "cat-2.png"]
    assert done.out.split() == [str(path) for path in paths]
    images = [read_image(path, None) for path in paths]
    assert images[0].shape == (SIZE, SIZE, 3)
    assert not np.array_equal(images[0], images[1])
    assert sorted(path.name for path in preview.iterdir()) == ["1-0001.png", "2-0001.png"]
    np.testing.assert_array_equal(read_image(preview / "2-0001.png", None), images[1])


def test_a_video_continues_an_image_or_a_video(run: Run, multimodal: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "first.png", np.full((SIZE, SIZE, 3), 90, np.uint8))
    out = tmp_path / "cat.gif"
    settings = (*GENERATE, "--out", out, "--fps", 5)
    first = run(
        "generate", "video", multimodal, *settings, "--frames", 3, "--first-frame",
        tmp_path / "first.png",
    )  # fmt: skip
    assert first.code == 0, first.err
    before = read_video(out, SIZE)
    assert len(before) == 3
    gif = tmp_path / "before.gif"
    write_video(gif, before, fps=5.0)
    more = run("generate", "video", multimodal, *settings, "--frames", 4, "--continue", gif)
    assert more.code == 0, more.err
    assert len(read_video(out, SIZE)) == 4


def test_images_and_videos_are_read_in_order(run: Run, multimodal: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", np.full((SIZE, SIZE, 3), 90, np.uint8))
    write_video(tmp_path / "b.mp4", np.zeros((3, SIZE, SIZE, 3), np.uint8), fps=4.0)
    options = ("--prompt", "what?", "--max-tokens", 3)
    media = ("--image", tmp_path / "a.png", "--video", tmp_path / "b.mp4")
    asked = [
        run("chat", multimodal, *options, *files) for files in (media, media[2:] + media[:2], ())
    ]
    assert [done.code for done in asked] == [0, 0, 0], [done.err for done in asked]
    counts = [done.err.split("prompt ")[1].split(" tokens")[0] for done in asked]
    assert counts[0] == counts[1]
    assert int(counts[0]) > int(counts[2]) + 4 * 5  # four frames of four codes and an end


def test_images_and_videos_that_are_refused(
    run: Run, multimodal: Path, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "no.png").write_text("no image", encoding="utf-8")
    other = make_vqgan(tmp_path / "other", codes=32)
    out, long = tmp_path / "out.png", tmp_path / "long.mp4"
    write_video(long, np.zeros((2048, 2, 2, 3), np.uint8), fps=4.0)
    image = ("generate", "image", multimodal, *GENERATE)
    video = ("generate", "video", multimodal, *GENERATE)
    for words, command in (
        ("text model", ("generate", "image", tiny, *GENERATE, "--out", out)),
        ("reads text only", ("chat", tiny, "--prompt", "what?", "--image", tmp_path / "no.png")),
        ("no.png", ("chat", multimodal, "--prompt", "what?", "--image", tmp_path / "no.png")),
        ("32 codes.*16", (*image, "--out", out, "--vqgan", other)),
        ("'.mp4'", (*image, "--out", "out.mp4")),
        ("'.png'", (*video, "--out", out)),
        ("--count is 0", (*image, "--out", out, "--count", 0)),
        ("100 frames.*at most", (*video, "--out", "out.mp4", "--frames", 100)),
        (
            "tokens and the context.*fewer frames",
            ("chat", multimodal, "--prompt", "what?", "--video", long, "--fps", 4),
        ),
        ("frames is 8 and there are 2048", (*video, "--out", "out.mp4", "--continue", long)),
        ("exclude each other", (*video, "--first-frame", "a.png", "--continue", "b.mp4")),
        ("prompt is empty", ("generate", "image", multimodal, "--prompt", " ")),
    ):
        done = run(*command)
        assert done.code == 2, (words, done.out, done.err)
        assert "Traceback" not in done.err
        last = done.err.strip().splitlines()[-1]
        assert all(part in last for part in words.split(".*")), (words, last)
    assert not out.exists()


def test_a_chat_encodes_its_video_once(
    run: Run, multimodal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (3, SIZE, SIZE, 3), np.uint8)
    write_video(tmp_path / "clip.gif", frames, fps=2.0)
    encode, encoded = VqganCodec.encode, []

    def count(codec: VqganCodec, pixels: np.ndarray, **settings: Any) -> np.ndarray:
        encoded.append(len(pixels))
        return encode(codec, pixels, **settings)

    monkeypatch.setattr(VqganCodec, "encode", count)
    done = run(
        "chat", multimodal, "--video", tmp_path / "clip.gif", "--max-tokens", 4,
        stdin="What?\nWhy?\n",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert sum(encoded) == 3
