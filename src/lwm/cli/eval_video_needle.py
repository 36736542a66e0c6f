"""`lwm eval video-needle`: what a model finds in a long video."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lwm.cli.eval_run import answered, digest, report
from lwm.cli.flags import ModelName, SharedLoad, SharedLoadFlags
from lwm.core.distributed import first_process
from lwm.core.errors import ConfigError

_WORDS = 512  # tokens that question and answer take at most


@dataclass(frozen=True, kw_only=True)
class VideoNeedleFlags:
    """Where cards are hidden and how finding them is judged."""

    video: Path | None = None
    """Video they are hidden in; a made-up one unless given."""
    fps: float = 1.0
    """Frames taken for a second of --video."""
    frames: str = "8:64:4"
    """Frames that are shown, the card's among them: 8,64 or min:max:count."""
    depths: str = "0:100:5"
    """Per cent of the video before the card: 0,50,100 or min:max:count."""
    depth_spacing: Literal["linear", "sigmoid"] = "linear"
    """Whether a range of depths is even or closer towards both ends."""
    rounds: int = 4
    """Cards for each count of frames and depth; four kinds of questions take turns."""
    seed: int = 0
    """Of the first card; the following count on."""
    score: Literal["generation", "logits"] = "generation"
    """Judge what the model writes, or whether each token of the answer is the likeliest."""
    max_tokens: int = 16
    """Longest answer."""
    batch_tokens: int = 0
    """Tokens of the prompts that are asked together; by default one prompt at a time, so that
    what a prompt shares with the one before is read once."""
    theta: float | None = None
    """Another base of the rotary positions; the context is then as long as the longest video."""
    out: Path | None = None
    """Directory for results, pictures and report; runs/eval/video-needle-MODEL unless given. A
    run that was interrupted goes on."""


Flags = Annotated[VideoNeedleFlags, tyro.conf.OmitArgPrefixes]


def video_needle(
    model: ModelName, /, flags: Flags = VideoNeedleFlags(), load: SharedLoad = SharedLoadFlags()
) -> None:
    """Find a picture that does not belong, hidden in a long video, by frames and depth."""
    with load.joined():
        _evaluate(model, flags, load)


def _evaluate(model: str, flags: VideoNeedleFlags, load: SharedLoadFlags) -> None:
    from lwm.checkpoints.open import open_checkpoint
    from lwm.cli.ranges import parse_depths, parse_lengths
    from lwm.evaluation.report.plots import sheet
    from lwm.evaluation.tasks.video_needle import (
        VideoNeedleTask,
        card_of,
        haystack_codes,
        paint,
        require_room,
    )
    from lwm.generation.codec import decode_frames, encode_frames
    from lwm.generation.frames import require_vision
    from lwm.generation.session import model_fingerprint

    counts = parse_lengths(flags.frames, "frames")
    depths = parse_depths(flags.depths, flags.depth_spacing)
    if flags.rounds < 1:
        raise ConfigError(f"rounds is {flags.rounds}; it must be at least 1")
    if flags.seed < 0:
        raise ConfigError(f"seed is {flags.seed}; it must be 0 or more")
    if counts[0] < 2:
        raise ConfigError(f"frames has {counts[0]}; 2 are the least, a card and something else")
    vision = require_vision(open_checkpoint(model, config=load.config).config)
    out = flags.out or Path("runs", "eval", f"video-needle-{Path(model).name}")
    room = counts[-1] * vision.tokens_per_frame + _WORDS + flags.max_tokens
    loaded = load.load(model, theta=flags.theta, length=None if flags.theta is None else room)
    seeds = range(flags.seed, flags.seed + flags.rounds)
    require_room(loaded.tokenizer, loaded.config, counts[-1], seeds, flags.max_tokens)
    codec = loaded.codec
    cards = [paint(card_of(seed), codec.config.image_size) for seed in seeds]
    task = VideoNeedleTask(
        tokenizer=loaded.tokenizer,
        config=loaded.config,
        video=haystack_codes(codec, counts[-1] - 1, flags.video, flags.fps),
        cards=encode_frames(codec, cards),
        frames=counts,
        depths=depths,
        seed=flags.seed,
        max_tokens=flags.max_tokens,
    )
    settings: dict[str, Any] = {
        "evaluation": "video-needle", "model": model, "theta": flags.theta, "dtype": loaded.dtype,
        "vqgan": load.vqgan, "video": None if flags.video is None else str(flags.video),
        "fps": flags.fps, "frames": counts, "depths": depths, "rounds": flags.rounds,
        "seed": flags.seed, "score": flags.score, "max_tokens": flags.max_tokens,
        "weights": model_fingerprint(loaded),
        "pictures": None if flags.video is None else digest(flags.video),
    }  # fmt: skip
    rows = answered(
        task, loaded, out, settings, score=flags.score, batch_tokens=flags.batch_tokens,
        place=lambda row: f"{row['frames']:,} frames, depth {row['depth_percent']}, "
        f"{row['answer']}",
    )  # fmt: skip
    if not first_process():
        return
    shown = {
        "card": cards[:8],
        "as the model sees it": decode_frames(codec, task.cards[:8, None])[:, 0],
    }
    cards_shown = sheet(shown, [card_of(seed).answer for seed in seeds][:8])
    report(task, out, settings, rows, pictures={"cards": cards_shown})
