"""Generate text, images and videos from a prompt: `lwm generate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lwm.cli.flags import Load, LoadFlags, ModelName, Sampling, SamplingFlags, print_stream
from lwm.cli.parsing import Text
from lwm.core.errors import InputError
from lwm.core.progress import say

if TYPE_CHECKING:
    import numpy as np

    from lwm.generation.frames import FrameDone
    from lwm.generation.model import Model


def generate_text(
    model: ModelName,
    /,
    prompt: Text,
    special: bool = False,
    load: Load = LoadFlags(),
    sampling: Sampling = SamplingFlags(max_tokens=256),
) -> None:
    """Continue a prompt, without a chat template.

    Args:
        prompt: Text to continue.
        special: Read control tokens spelled in the prompt, such as </s>, as these tokens.
    """
    if not prompt.strip():
        raise InputError("the prompt is empty; write some text to continue after --prompt")
    loaded = load.load(model)
    print_stream(loaded.generate(prompt, stream=True, special=special, **vars(sampling)))
    say(f"({loaded.timings})")


@dataclass(frozen=True, kw_only=True)
class VisionSamplingFlags:
    """Choose how images and frames are sampled."""

    guidance: float | None = None
    """Strength of guidance, 1 for none; defaults to the model's (the original's: 5), and to 1 for
    later frames."""
    top_k: int | None = None
    """Sample from the k most likely codes, 0 for all; defaults to 8192, later frames 1000."""
    temperature: float = 1.0
    """0 takes the most likely code; higher values are more varied."""
    top_p: float = 1.0
    """Sample from the most likely codes whose probabilities sum to this."""
    min_p: float | None = None
    """Sample from codes at least this fraction as likely as the likeliest; defaults to the model's
    (the original's: 0)."""
    seed: int = 0
    """Seed of the sampling; the same seed gives the same images."""
    negative_prompt: Text | None = None
    """Text that guidance leads away from; only used if --guidance is not 1."""
    count: int = 1
    """Number of images or videos, generated together."""
    preview: Path | None = None
    """Directory to write each frame to as soon as it is generated."""

    def settings(self) -> dict[str, Any]:
        """Return what `Model.image` and `Model.video` take, without what was not chosen."""
        if self.count < 1:
            raise InputError(f"--count is {self.count}; it must be at least 1")
        chosen = {name: value for name, value in vars(self).items() if value is not None}
        chosen.pop("preview", None)
        return chosen


VisionSampling = Annotated[VisionSamplingFlags, tyro.conf.OmitArgPrefixes]


def generate_image(
    model: ModelName,
    /,
    prompt: Text,
    out: Path = Path("image.png"),
    load: Load = LoadFlags(),
    sampling: VisionSampling = VisionSamplingFlags(),
) -> None:
    """Generate images from a prompt, and print their paths.

    Args:
        prompt: Description of the image.
        out: A .png, .jpg or .jpeg file to write; with --count, each name gets a number.
    """
    from lwm.media.images import require_image_name, write_image

    require_image_name(out)
    settings = sampling.settings()
    loaded = load.load(model)
    images = loaded.image(prompt, frame_done=_preview(loaded, sampling.preview), **settings)
    for path, pixels in zip(_numbered(out, sampling.count), images, strict=True):
        write_image(path, pixels)
        print(path)


def generate_video(
    model: ModelName,
    /,
    prompt: Text,
    out: Path = Path("video.mp4"),
    frames: int = 8,
    fps: float = 4.0,
    first_frame: Path | None = None,
    continued: Annotated[Path | None, tyro.conf.arg(name="continue")] = None,
    load: Load = LoadFlags(),
    sampling: VisionSampling = VisionSamplingFlags(),
) -> None:
    """Generate videos from a prompt, and print their paths.

    Args:
        prompt: Description of the video.
        out: A .mp4, .webm or .gif file to write; with --count, each name gets a number.
        frames: Number of frames, including any from --first-frame or --continue.
        fps: Frames per second, of the generated video and of the one to continue.
        first_frame: Image to begin with.
        continued: Video to continue.
    """
    from lwm.media.videos import require_video_name, write_video

    require_video_name(out, fps)
    settings = sampling.settings()
    if first_frame is not None and continued is not None:
        raise InputError("--first-frame and --continue exclude each other; use one")
    loaded = load.load(model)
    before = None
    for kind, path in (("image", first_frame), ("video", continued)):
        if path is not None:
            before = {"type": kind, kind: path, "fps": fps}
    preview = _preview(loaded, sampling.preview)
    videos = loaded.video(prompt, frames=frames, before=before, frame_done=preview, **settings)
    for path, pixels in zip(_numbered(out, sampling.count), videos, strict=True):
        write_video(path, pixels, fps=fps)
        print(path)


def _numbered(out: Path, count: int) -> list[Path]:
    if count == 1:
        return [out]
    return [out.with_stem(f"{out.stem}-{number + 1}") for number in range(count)]


def _preview(model: "Model", directory: Path | None) -> "FrameDone | None":
    """Return a callback that writes each frame as soon as it is generated."""
    from lwm.generation.vision_prompts import require_vision

    require_vision(model.config)
    if directory is None:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    from lwm.generation.codec import decode_frames
    from lwm.media.images import write_image

    def write(number: int, frame: int, codes: "np.ndarray") -> None:
        path = directory / f"{number + 1}-{frame + 1:04}.png"
        write_image(path, decode_frames(model.codec, codes[None, None])[0, 0])

    return write
