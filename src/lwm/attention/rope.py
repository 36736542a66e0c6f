"""Apply rotary position embedding to interleaved pairs: dimensions 2i and 2i + 1 form a pair.

This is the layout of the original and of GGUF files. Hugging Face checkpoints pair i with i + d/2
and are permuted when they are read.

Source: Su et al. 2021 (arXiv 2104.09864), section 3.4.2. Scaling: formulas and names of
transformers' `modeling_rope_utils`; YaRN is Peng et al. 2023 (arXiv 2309.00071).
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Gt, Lt
from jaxtyping import Array, Float, Float32, Int

from lwm.core.config import Checked
from lwm.core.errors import ConfigError

_Positive = Annotated[float, Gt(0), Lt(math.inf)]


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Checked, section="rope_scaling"):
    """Configure how frequencies change for sequences longer than a model was first trained for."""

    rope_type: Literal["linear", "dynamic", "llama3", "yarn", "factors"]
    """linear divides all frequencies by the factor; llama3 and yarn divide low frequencies and
    blend towards high ones; dynamic raises theta with the length of the sequence; factors divides
    each frequency by its own number, as a tensor of GGUF files does."""
    original_max_position_embeddings: Annotated[int, Ge(1)]
    """Longest sequence before scaling."""
    factor: _Positive = 1.0
    low_freq_factor: _Positive = 1.0
    high_freq_factor: _Positive = 4.0
    beta_fast: _Positive = 32.0
    beta_slow: _Positive = 1.0
    attention_factor: _Positive | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"rope_scaling.low_freq_factor is {self.low_freq_factor:g}; it must be less than "
                f"rope_scaling.high_freq_factor, {self.high_freq_factor:g}"
            )
        if not all(0 < factor < math.inf for factor in self.factors):
            raise ConfigError("rope_scaling.factors must be positive numbers")

    def context(self, longest: int) -> int:
        """Return the context of a model whose configuration says `longest`: files disagree on
        whether that is the length before or after scaling."""
        if self.rope_type in ("llama3", "factors"):
            return longest
        return max(longest, int(self.factor * self.original_max_position_embeddings))

    def require(self, head_dim: int, theta: float) -> None:
        """Raise ConfigError if the formulas are not defined for heads of this size and theta."""
        if self.rope_type == "factors" and len(self.factors) != head_dim // 2:
            raise ConfigError(
                f"rope_scaling.factors has {len(self.factors)} numbers; heads of {head_dim} need "
                f"{head_dim // 2}"
            )
        if self.rope_type == "dynamic" and head_dim == 2:
            raise ConfigError("rope_scaling 'dynamic' needs heads larger than 2")
        if self.rope_type == "yarn" and theta <= 1:
            raise ConfigError(f"rope_scaling 'yarn' needs a theta above 1; it is {theta:g}")


class RotaryAngles(NamedTuple):
    """Hold cosine and sine of the angles of each position, float32."""

    cosine: Float[Array, "batch seq half"]
    sine: Float[Array, "batch seq half"]


def rotary_angles(
    positions: Int[Array, "batch seq"],
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
) -> RotaryAngles:
    """Compute the angles: p / theta ** (2i / head_dim) for pair i at position p, before scaling.

    `dynamic` scaling takes the largest position as the length of the sequences.
    """
    frequencies: Any = rotary_frequencies(head_dim, theta, scaling)
    amplitude = 1.0
    if scaling is not None and scaling.rope_type == "dynamic":
        original = scaling.original_max_position_embeddings
        length = jnp.maximum(positions.max() + 1, original).astype(jnp.float32)
        growth = scaling.factor * length / original - (scaling.factor - 1)
        raised = np.float32(theta) * growth ** (head_dim / (head_dim - 2))
        frequencies = 1.0 / raised ** _exponents(head_dim)
    elif scaling is not None and scaling.rope_type == "yarn":
        amplitude = _yarn_amplitude(scaling)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return RotaryAngles(jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude)


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Float32[np.ndarray, " half"]:
    """Return the change of each pair's angle from one position to the next; for `dynamic` scaling,
    up to the original length."""
    plain = (1.0 / np.float32(theta) ** _exponents(head_dim)).astype(np.float32)
    if scaling is None or scaling.rope_type == "dynamic":
        return plain
    original = scaling.original_max_position_embeddings
    divisor: Any = np.float32(scaling.factor)
    share: Any = 0.0  # of each plain frequency in the result
    if scaling.rope_type == "factors":
        divisor = np.array(scaling.factors, np.float32)
    elif scaling.rope_type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = original * plain / (2 * np.pi)  # within the original context
        share = np.clip((turns - low) / (high - low), 0, 1)
    elif scaling.rope_type == "yarn":
        first, last = (
            head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (scaling.beta_fast, scaling.beta_slow)
        )
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        width = last - first or 0.001
        share = 1 - np.clip((np.arange(head_dim // 2) - first) / width, 0, 1)
    return (plain / divisor * (1 - share) + plain * share).astype(np.float32)


def _exponents(head_dim: int) -> np.ndarray:
    return np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)


def _yarn_amplitude(scaling: RopeScaling) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return scale(scaling.mscale) / scale(scaling.mscale_all_dim)
    return scale(1.0)


def apply_rotary(
    x: Float[Array, "batch seq heads dim"], angles: RotaryAngles
) -> Float[Array, "batch seq heads dim"]:
    """Rotate each pair of each head; compute in float32 and return x's own type."""
    cosine, sine = angles.cosine[:, :, None, :], angles.sine[:, :, None, :]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
