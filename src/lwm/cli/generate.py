"""`lwm generate`: text that goes on from a prompt, pictures and videos of one."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lwm.cli.flags import Load, LoadFlags, ModelName, Sampling, SamplingFlags, print_stream
from lwm.core.errors import InputError
from lwm.core.progress import say

if TYPE_CHECKING:
    import numpy as np

    from lwm.generation.frames import FrameDone
    from lwm.generation.model import Model


def generate_text(
    model: ModelName,
    /,
    prompt: str,
    load: Load = LoadFlags(),
    sampling: Sampling = SamplingFlags(max_tokens=256),
) -> None:
    """Continue a prompt, without any chat form.

    Args:
        prompt: Text to continue.
    """
    if not prompt.strip():
        raise InputError("the prompt is empty; write some text to continue after --prompt")
    loaded = load.load(model)
    print_stream(loaded.generate(prompt, stream=True, **sampling.settings()))
    say(f"({loaded.timings})")


@dataclass(frozen=True, kw_only=True)
class DrawingFlags:
    """How codes of pictures are chosen."""

    guidance: float | None = None
    """How strongly the prompt guides, 1 for not at all and in half the time; 5 for an image and
    the first frame of a video, 1 behind it, unless given."""
    top_k: int | None = None
    """Choose among the k likeliest codes, 0 for all; 8192 for an image and the first frame of a
    video, 1000 behind it, unless given."""
    temperature: float = 1.0
    """0 takes the likeliest code; higher is more varied."""
    top_p: float = 1.0
    """Choose among the likeliest codes whose probabilities sum to this."""
    seed: int = 0
    """The same seed gives the same pictures."""
    negative_prompt: str | None = None
    """What guidance leads away from, where it is not 1; anything unless given."""
    count: int = 1
    """How many to draw, all at once."""
    preview: Path | None = None
    """A directory for frames as they are drawn."""

    def settings(self) -> dict[str, Any]:
        """What is not the model's usual."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        given.pop("preview", None)
        return given

    def require_count(self) -> None:
        if self.count < 1:
            raise InputError(f"--count is {self.count}; ask for at least 1")


Drawing = Annotated[DrawingFlags, tyro.conf.OmitArgPrefixes]


def generate_image(
    model: ModelName,
    /,
    prompt: str,
    out: Path = Path("image.png"),
    load: Load = LoadFlags(),
    drawing: Drawing = DrawingFlags(),
) -> None:
    """Draw pictures of a prompt; prints where they are.

    Args:
        prompt: What is to be drawn.
        out: A .png, .jpg or .jpeg file; of several, each name gets a number.
    """
    from lwm.media.images import require_image_name, write_image

    require_image_name(out)
    drawing.require_count()
    loaded = load.load(model)
    drawn = loaded.image(prompt, frame_done=_preview(loaded, drawing), **drawing.settings())
    for path, pixels in zip(_names(out, drawing.count), drawn, strict=True):
        write_image(path, pixels)
        print(path)


def generate_video(
    model: ModelName,
    /,
    prompt: str,
    out: Path = Path("video.mp4"),
    frames: int = 8,
    fps: float = 4.0,
    first_frame: Path | None = None,
    continued: Annotated[Path | None, tyro.conf.arg(name="continue")] = None,
    load: Load = LoadFlags(),
    drawing: Drawing = DrawingFlags(),
) -> None:
    """Draw videos of a prompt; prints where they are.

    Args:
        prompt: What is to be drawn.
        out: A .mp4, .webm or .gif file; of several, each name gets a number.
        frames: Frames of the whole video, given ones included.
        fps: Frames a second, of the video drawn and of one that is continued.
        first_frame: A picture to begin with.
        continued: A video to go on from.
    """
    from lwm.media.videos import require_video_name, write_video

    require_video_name(out, fps)
    drawing.require_count()
    if first_frame is not None and continued is not None:
        raise InputError("--first-frame and --continue both say how it begins; give one of them")
    loaded = load.load(model)
    before = None
    if first_frame is not None:
        before = loaded.codes({"type": "image", "image": first_frame})[None]
    elif continued is not None:
        before = loaded.codes({"type": "video", "video": continued, "fps": fps})[None]
    drawn = loaded.video(
        prompt, frames=frames, before=before, frame_done=_preview(loaded, drawing),
        **drawing.settings(),
    )  # fmt: skip
    for path, pixels in zip(_names(out, drawing.count), drawn, strict=True):
        write_video(path, pixels, fps=fps)
        print(path)


def _names(out: Path, count: int) -> list[Path]:
    if count == 1:
        return [out]
    return [out.with_stem(f"{out.stem}-{number + 1}") for number in range(count)]


def _preview(model: "Model", drawing: DrawingFlags) -> "FrameDone | None":
    """Writes each frame as soon as it is drawn."""
    from lwm.generation.frames import require_vision

    require_vision(model.config)
    directory = drawing.preview
    if directory is None:
        return None
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--preview {directory} cannot be made: {error.strerror}; choose another directory"
        ) from error
    from lwm.generation.vision_generation import decode_frames
    from lwm.media.images import write_image

    def write(number: int, frame: int, codes: "np.ndarray") -> None:
        path = directory / f"{number + 1}-{frame + 1:04}.png"
        write_image(path, decode_frames(model.codec, codes[None, None])[0, 0])

    return write
