"""The world model's vocabulary: ids of text first, ids of vision behind them.

A model that sees is a Llama with one table of both: what picks the table is the id itself, so
attention, caches, packing and sharding need to know nothing of it. The original keeps two tables
and two number spaces, and a mask that says which is meant; `joined` translates. This file knows
ids of vision; where those of text end is the model's `vocab_size`.

Source: LargeWorldModel paper (arXiv 2402.08268), section 4.1.
"""

from dataclasses import dataclass

import numpy as np

from lwm.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class VisionVocabulary:
    """The ids of vision, counted from 0 as codes are: codes, two end tokens, some unused."""

    size: int = 8448
    """All ids, rows of the table."""
    codes: int = 8192
    """Entries of the VQGAN's codebook."""
    codes_per_frame: int = 256
    """Codes of one picture, row by row."""

    def __post_init__(self) -> None:
        if self.codes < 1 or self.codes_per_frame < 1:
            raise ConfigError(
                f"vision.codes is {self.codes} and vision.codes_per_frame "
                f"{self.codes_per_frame}; both must be at least 1"
            )
        if self.size < self.codes + 2:
            raise ConfigError(
                f"vision.size is {self.size}; {self.codes} codes and two end tokens need at least "
                f"{self.codes + 2}"
            )

    @property
    def end_of_frame(self) -> int:
        """Follows each frame but the last."""
        return self.codes

    @property
    def end_of_video(self) -> int:
        """Follows the last frame, and so a picture."""
        return self.codes + 1

    @property
    def tokens_per_frame(self) -> int:
        return self.codes_per_frame + 1


def joined(tokens: np.ndarray, vision_mask: np.ndarray, vocab_size: int) -> np.ndarray:
    """Ids of the one table from ids of two and the mask that says which.

    Args:
        vocab_size: ids of text.
    """
    return np.where(vision_mask, tokens + vocab_size, tokens)
