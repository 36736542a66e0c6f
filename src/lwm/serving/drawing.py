"""Draw images and videos with the worker's engine, on threads of their own."""

import secrets
from typing import Any

import numpy as np
from jaxtyping import UInt8

from lwm.generation.codec import decode_frames
from lwm.generation.frames import EarlierFrames, FrameDone, default_sampling, video_codes
from lwm.generation.media_inputs import count_part_frames
from lwm.generation.vision_prompts import Part
from lwm.serving.host import Host
from lwm.serving.schemas import DrawingBody
from lwm.serving.worker import RemoteEngine

_SETTINGS = ("guidance", "temperature", "top_k", "top_p", "min_p", "seed")


class Drawing:
    """Draw once; `cancel`, from any thread, ends it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._engine = RemoteEngine(host.worker)

    def cancel(self) -> None:
        """End what is being drawn; do nothing if it is complete."""
        self._engine.cancel()

    def frames(
        self,
        body: DrawingBody,
        *,
        frames: int = 1,
        count: int = 1,
        before: Part | None = None,
        frame_done: FrameDone | None = None,
    ) -> UInt8[np.ndarray, "count frames height width 3"]:
        """Draw videos; a video of one frame is an image. Blocks until all are complete.

        Args:
            before: image that a video begins with, or video that it continues.
        """
        model = self._host.model
        settings: dict[str, Any] = {
            name: value for name in _SETTINGS if (value := getattr(body, name)) is not None
        }
        settings.setdefault("seed", secrets.randbits(32))
        earlier = None
        if before is not None:
            earlier = EarlierFrames(count_part_frames(before), lambda: model.codes(before)[None])
        first_frame, later = default_sampling(model.config)
        codes = video_codes(
            self._engine.with_room(self._host.require_room), model.config, model.tokenizer,
            body.prompt, frames=frames, count=count, before=earlier,
            negative_prompt=body.negative_prompt, sampling=later.updated(settings),
            first_sampling=first_frame.updated(settings), frame_done=frame_done,
        )  # fmt: skip
        return decode_frames(model.codec, codes)
