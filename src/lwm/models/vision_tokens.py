"""Define the token ids of images and videos in a vision-language model.

A vision-language model is a Llama with one table of ids: text first, then vision. Vision ids in
this module count from 0; the first vision row of the table is the model's `vocab_size`. The
original has two tables and a mask that selects one; `single_table_ids` converts.

Source: LargeWorldModel paper (arXiv 2402.08268), section 4.1.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le, Lt
from jaxtyping import Int, Int32

from lwm.core.config import Checked
from lwm.core.errors import ConfigError, InputError


@dataclass(frozen=True, kw_only=True)
class VisionVocabulary(Checked, section="vision"):
    """Define the vision ids, counted from 0: VQGAN codes, two end tokens, unused ids.

    How a model's codes are best sampled belongs to it too; two vocabularies that differ only in
    that are equal.
    """

    size: int = 8448
    """All ids, rows of the table."""
    codes: Annotated[int, Ge(1)] = 8192
    """Entries of the VQGAN's codebook."""
    codes_per_frame: Annotated[int, Ge(1)] = 256
    """Codes of one image, row by row."""
    guidance: Annotated[float, Gt(-math.inf), Lt(math.inf)] = field(default=5.0, compare=False)
    """Guidance of images, and of the first frame of a video, unless a request sets it."""
    min_p: Annotated[float, Ge(0), Le(1)] = field(default=0.0, compare=False)
    """Codes of images and videos are at least this fraction as likely as the likeliest one, unless
    a request sets it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < self.codes + 2:
            raise ConfigError(
                f"vision.size is {self.size}; {self.codes} codes and two end tokens need at least "
                f"{self.codes + 2}"
            )

    @property
    def end_of_frame(self) -> int:
        """Return the token that follows each frame but the last."""
        return self.codes

    @property
    def end_of_video(self) -> int:
        """Return the token that follows the last frame of a video, or an image."""
        return self.codes + 1

    @property
    def tokens_per_frame(self) -> int:
        """Return the number of codes in a frame, plus its end token."""
        return self.codes_per_frame + 1

    def interleave(
        self, codes: Int[np.ndarray, "frames codes_per_frame"], *, ended: bool = True
    ) -> Int32[np.ndarray, " tokens"]:
        """Return the ids of frames: the codes of each, then its end token.

        `ended` says whether the last one ends the video. Raise InputError if there are none, or if
        they do not fit this vocabulary.
        """
        if codes.shape[1:] != (self.codes_per_frame,) or len(codes) == 0:
            raise InputError(
                f"the codes have shape {list(codes.shape)}; the model needs at least one frame of "
                f"{self.codes_per_frame}, so use the VQGAN that it was trained with"
            )
        if codes.min() < 0 or codes.max() >= self.codes:
            raise InputError(
                f"the codes run from {codes.min()} to {codes.max()}; the model has codes 0 to "
                f"{self.codes - 1}, so use the VQGAN that it was trained with"
            )
        return np.hstack([codes, self._ends(len(codes), ended)]).astype(np.int32).ravel()

    def split(self, ids: Int[np.ndarray, " tokens"]) -> Int[np.ndarray, "frames codes_per_frame"]:
        """Invert `interleave` for a whole image or video; raise InputError for other ids."""
        if len(ids) == 0 or len(ids) % self.tokens_per_frame:
            raise InputError(
                f"{len(ids)} vision ids are not a multiple of {self.tokens_per_frame}; a frame is "
                f"{self.codes_per_frame} codes and an end token"
            )
        frames = ids.reshape(-1, self.tokens_per_frame)
        codes, ends = frames[:, :-1], frames[:, -1:]
        misplaced = (ends != self._ends(len(frames), ended=True)).any()
        if codes.min() < 0 or codes.max() >= self.codes or misplaced:
            raise InputError(
                f"vision ids are not frames of {self.codes_per_frame} codes below {self.codes}, "
                f"each followed by {self.end_of_frame}, the last by {self.end_of_video}; encode "
                "them with the model's VQGAN"
            )
        return codes

    def ids_at(self, place: int, frames: int) -> range:
        """Return the ids that are valid at a place in `frames` interleaved frames."""
        frame, within = divmod(place, self.tokens_per_frame)
        if within < self.codes_per_frame:
            return range(self.codes)
        end = self.end_of_video if frame + 1 == frames else self.end_of_frame
        return range(end, end + 1)

    def _ends(self, frames: int, ended: bool) -> Int[np.ndarray, "frames one"]:
        ends = np.full((frames, 1), self.end_of_frame)
        if ended:
            ends[-1] = self.end_of_video
        return ends


def single_table_ids(tokens: np.ndarray, vision_mask: np.ndarray, vocab_size: int) -> np.ndarray:
    """Convert ids of two tables, and the mask that selects one, to ids of one table."""
    return np.where(vision_mask, tokens + vocab_size, tokens)
