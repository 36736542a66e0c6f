"""Check the images and videos of VQGAN training: held-out files and reproducible crops."""

import numpy as np
import pytest
from PIL import Image

from lwm.core.errors import ConfigError, InputError
from lwm.data.images import (
    Crops,
    ImageDataConfig,
    evaluation_batches,
    read_image_files,
    split_files,
)
from lwm.media.images import write_image
from lwm.media.videos import write_video


@pytest.fixture
def folder(tmp_path):
    draw = np.random.default_rng(0)
    (tmp_path / "deep").mkdir()
    for name in ("cat.png", "dog.png", "deep/cow.jpg"):
        write_image(tmp_path / name, draw.integers(0, 256, (24, 30, 3), np.uint8))
    write_video(tmp_path / "run.mp4", draw.integers(0, 256, (6, 32, 32, 3), np.uint8), fps=4.0)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_files_are_held_out_whole(folder) -> None:
    config = ImageDataConfig(path=str(folder), held_out=("c*",))
    training, held_out = split_files(config)
    assert [file.name for file in training] == ["dog.png", "run.mp4"]
    assert sorted(file.name for file in held_out) == ["cat.png", "cow.jpg"]
    sizes = {file.name: images.shape for file, images in read_image_files(training, 16, 4)}
    assert sizes == {"dog.png": (1, 16, 16, 3), "run.mp4": (4, 16, 16, 3)}
    globbed, _ = split_files(ImageDataConfig(path=f"{folder}/*.png, {folder}/run.mp4"))
    assert [file.name for file in globbed] == ["cat.png", "dog.png", "run.mp4"]


def test_files_that_cannot_be_read_are_reported_and_skipped(folder, capsys) -> None:
    (folder / "drawing.svg").write_text("<svg/>")
    (folder / "half.jpg").write_bytes((folder / "deep" / "cow.jpg").read_bytes()[:200])
    Image.new("RGB", (20, 20)).save(folder / "still.avif")
    files, _ = split_files(ImageDataConfig(path=str(folder)))
    assert len(files) == 7
    images = {file.name: len(squares) for file, squares in read_image_files(files, 16, 4)}
    assert images == {"cat.png": 1, "cow.jpg": 1, "dog.png": 1, "run.mp4": 4, "still.avif": 1}
    report = capsys.readouterr().err
    assert "drawing.svg is not an image that can be read" in report
    assert "half.jpg cannot be read as an image" in report
    assert "skipped 2 of 7 files" in report
    with pytest.raises(InputError, match=r"none of 1 files can be read: .*drawing\.svg"):
        list(read_image_files([folder / "drawing.svg"], 16, 4))


@pytest.mark.parametrize(
    ("path", "held_out", "message"),
    [
        ("{}", ("bird*",), "bird"),
        ("{}", ("*",), "no image or video to learn from"),
        ("{}/absent", (), "names no file"),
        ("", (), "no image or video to learn from"),
    ],
)
def test_paths_without_training_files_are_refused(folder, path, held_out, message) -> None:
    with pytest.raises(InputError, match=message):
        split_files(ImageDataConfig(path=path.format(folder), held_out=held_out))


@pytest.mark.parametrize("changes", [{"smallest": 0.0}, {"colors": 2.0}, {"frames": 0}])
def test_wrong_settings_are_refused(changes) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        ImageDataConfig(**changes)


def test_crops_depend_only_on_seed_and_number() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)

    def crops(seed: int = 0) -> Crops:
        return Crops(images, ImageDataConfig(seed=seed), size=8, batch_size=2)

    first = crops()
    batches = [next(first) for _ in range(3)]
    assert batches[0]["pixels"].shape == (2, 8, 8, 3)
    assert batches[0]["pixels"].dtype == np.float32
    assert max(np.abs(batch["pixels"]).max() for batch in batches) <= 1
    state = first.iterator.get_state()
    after = next(first)
    again = crops()
    again.iterator.set_state(state)
    np.testing.assert_array_equal(next(again)["pixels"], after["pixels"])
    assert not np.array_equal(next(crops(1))["pixels"], batches[0]["pixels"])


def test_full_crop_without_colors_is_the_image_or_its_mirror() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    config = ImageDataConfig(smallest=1.0, colors=0.0)
    made = Crops(image, config, size=8, batch_size=8)
    expected = image[0].astype(np.float32) / 127.5 - 1
    mirrored = 0
    for pixels in next(made)["pixels"]:
        mirror = np.allclose(pixels, expected[:, ::-1], atol=1e-6)
        assert mirror or np.allclose(pixels, expected, atol=1e-6)
        mirrored += mirror
    assert 0 < mirrored < 8


def test_last_batch_is_padded_with_zero_weight() -> None:
    images = np.full((3, 4, 4, 3), 255, np.uint8)
    batches = list(evaluation_batches(images, 2))
    assert [batch["weights"].tolist() for batch in batches] == [[1, 1], [1, 0]]
    assert (batches[1]["pixels"][0] == 1).all()
