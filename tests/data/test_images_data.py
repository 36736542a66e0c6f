"""Pictures for a codec: files split whole, parts that follow from a number."""

import numpy as np
import pytest

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
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_files_are_found_and_held_out_whole(folder) -> None:
    config = ImageDataConfig(path=str(folder), held_out=("c*",))
    learnt, kept = split_files(config)
    assert [file.name for file in learnt] == ["dog.png", "run.mp4"]
    assert sorted(file.name for file in kept) == ["cat.png", "cow.jpg"]
    sizes = {file.name: pictures.shape for file, pictures in read_image_files(learnt, 16, 4)}
    assert sizes == {"dog.png": (1, 16, 16, 3), "run.mp4": (4, 16, 16, 3)}
    globbed, _ = split_files(ImageDataConfig(path=f"{folder}/*.png, {folder}/run.mp4"))
    assert [file.name for file in globbed] == ["cat.png", "dog.png", "run.mp4"]


@pytest.mark.parametrize(
    ("path", "held_out", "said"),
    [
        ("{}", ("bird*",), "bird"),
        ("{}", ("*",), "no image or video to learn from"),
        ("{}/absent", (), "names no file"),
        ("", (), "no image or video to learn from"),
    ],
)
def test_nothing_to_learn_from_is_said(folder, path, held_out, said) -> None:
    with pytest.raises(InputError, match=said):
        split_files(ImageDataConfig(path=path.format(folder), held_out=held_out))


@pytest.mark.parametrize("changes", [{"smallest": 0.0}, {"colors": 2.0}, {"frames": 0}])
def test_wrong_settings_are_refused(changes) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        ImageDataConfig(**changes)


def test_parts_follow_from_their_number_alone() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)

    def crops(seed: int = 0) -> Crops:
        return Crops(pictures, ImageDataConfig(seed=seed), size=8, batch_size=2)

    first = crops()
    seen = [next(first) for _ in range(3)]
    assert seen[0]["pixels"].shape == (2, 8, 8, 3)
    assert seen[0]["pixels"].dtype == np.float32
    assert max(np.abs(batch["pixels"]).max() for batch in seen) <= 1
    state = first.iterator.get_state()
    after = next(first)
    again = crops()
    again.iterator.set_state(state)
    np.testing.assert_array_equal(next(again)["pixels"], after["pixels"])
    assert not np.array_equal(next(crops(1))["pixels"], seen[0]["pixels"])


def test_an_uncoloured_whole_picture_is_itself_or_its_mirror() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    config = ImageDataConfig(smallest=1.0, colors=0.0)
    made = Crops(picture, config, size=8, batch_size=8)
    wanted = picture[0].astype(np.float32) / 127.5 - 1
    mirrored = 0
    for pixels in next(made)["pixels"]:
        mirror = np.allclose(pixels, wanted[:, ::-1], atol=1e-6)
        assert mirror or np.allclose(pixels, wanted, atol=1e-6)
        mirrored += mirror
    assert 0 < mirrored < 8


def test_the_last_batch_is_filled_up_without_weight() -> None:
    pictures = np.full((3, 4, 4, 3), 255, np.uint8)
    batches = list(evaluation_batches(pictures, 2))
    assert [batch["weights"].tolist() for batch in batches] == [[1, 1], [1, 0]]
    assert (batches[1]["pixels"][0] == 1).all()
