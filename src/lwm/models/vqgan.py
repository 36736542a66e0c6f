"""Encode images, with pixels in [-1, 1], as small grids of codes, and decode them.

Sources: Esser et al. 2021 (arXiv 2012.09841), sections 3.1 and A; the LargeWorldModel paper
(arXiv 2402.08268), section 4.1, for the sizes; Mentzer et al. 2023 (arXiv 2309.15505), section 3,
for finite scalar quantization.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from annotated_types import Ge, Le
from jaxtyping import Array, Float, Int

from lwm.core.config import Checked
from lwm.core.errors import ConfigError
from lwm.core.params import Initializer, ParamSpec, kernel, normal, ones, zeros
from lwm.core.pytree import pytree

_NORM_EPSILON = 1e-6
_MAX_LEVELS, _MAX_BLOCKS, _MAX_PATCH = 12, 64, 64
"""Limits on what a configuration may claim, so that a broken one is refused before it is built."""

_Images = Float[Array, "batch height width 3"]
_Codes = Int[Array, "batch rows columns"]
_Latents = Float[Array, "batch rows columns code_channels"]


@dataclass(frozen=True, kw_only=True)
class VQGANConfig(Checked, section="vqgan"):
    """Configure the sizes of a VQGAN; the defaults are the original's."""

    image_size: Annotated[int, Ge(1)] = 256
    """Height and width of training images; others work if `downsampling` divides them."""
    hidden_channels: Annotated[int, Ge(1)] = 128
    """Channels at full resolution."""
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4, 6)
    """Channels of each level in units of `hidden_channels`; all but the last halve the sides."""
    residual_blocks: Annotated[int, Ge(1), Le(_MAX_BLOCKS)] = 2
    """Blocks in a level of the encoder; the decoder has one more."""
    latent_channels: Annotated[int, Ge(1)] = 64
    """Channels between encoder and codebook."""
    codebook_size: Annotated[int, Ge(1)] = 8192
    """Number of entries of the codebook."""
    code_channels: Annotated[int, Ge(1)] = 64
    """Channels of an entry."""
    norm_groups: Annotated[int, Ge(1)] = 32
    """Groups of channels that are normalized together."""
    patch_size: Annotated[int, Ge(1), Le(_MAX_PATCH)] = 1
    """Side of the squares of pixels that are channels of one place before the first convolution;
    1 convolves pixels, as the original does."""
    local_encoder: bool = False
    """Encode each code from the pixels that it covers and no others, so that equal squares have
    equal codes."""
    scalar_levels: tuple[int, ...] = ()
    """Finite scalar quantization: the number of values of each of `code_channels`, whose
    combinations are the codebook, which the settings of `codebook` then leave as it is; empty
    trains a codebook, as the original does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.channel_multipliers)
        if not 1 <= levels <= _MAX_LEVELS or min(self.channel_multipliers) < 1:
            raise ConfigError(
                f"vqgan.channel_multipliers is {self.channel_multipliers}, {levels} levels; it "
                f"must have 1 to {_MAX_LEVELS}, and each must be at least 1"
            )
        combinations = math.prod(self.scalar_levels)
        if self.scalar_levels and (
            min(self.scalar_levels) < 2
            or len(self.scalar_levels) != self.code_channels
            or combinations != self.codebook_size
        ):
            raise ConfigError(
                f"vqgan.scalar_levels is {self.scalar_levels}, {combinations} combinations of "
                f"{len(self.scalar_levels)} values; each must be at least 2, and "
                f"vqgan.codebook_size ({self.codebook_size}) and vqgan.code_channels "
                f"({self.code_channels}) must equal these numbers"
            )
        if self.hidden_channels % self.norm_groups:
            raise ConfigError(
                f"vqgan.norm_groups is {self.norm_groups}, which does not divide "
                f"vqgan.hidden_channels ({self.hidden_channels}); choose a divisor"
            )
        if self.image_size % self.downsampling:
            raise ConfigError(
                f"vqgan.image_size is {self.image_size}; it must be a multiple of "
                f"{self.downsampling}, by which {levels} levels shrink it"
            )

    @property
    def channels(self) -> tuple[int, ...]:
        """Return the channels of each level, from full resolution down."""
        return tuple(self.hidden_channels * factor for factor in self.channel_multipliers)

    @property
    def downsampling(self) -> int:
        """Return how many pixels of a side one code covers."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def codes_per_frame(self) -> int:
        """Return the codes of an image of `image_size`."""
        return (self.image_size // self.downsampling) ** 2


@pytree
class Convolution:
    """Hold a kernel and a bias."""

    kernel: Float[Array, "height width in out"]
    bias: Float[Array, " out"]


@pytree
class Norm:
    """Hold a scale and a bias."""

    scale: Float[Array, " channels"]
    bias: Float[Array, " channels"]


@pytree
class ResidualBlock:
    """Hold two convolutions, each after a norm; `skip` if the number of channels changes."""

    norm_in: Norm
    conv_in: Convolution
    norm_out: Norm
    conv_out: Convolution
    skip: Convolution | None


@pytree
class Level:
    """Hold the blocks at one resolution, and the convolution to the next; None at the last."""

    blocks: tuple[ResidualBlock, ...]
    resample: Convolution | None


@pytree
class Network:
    """Hold an encoder or a decoder; levels are in the order in which they are applied."""

    conv_in: Convolution
    levels: tuple[Level, ...]
    middle: tuple[ResidualBlock, ...]
    norm: Norm
    conv_out: Convolution


@pytree
class VQGAN:
    """Hold all weights."""

    encoder: Network
    to_codes: Convolution
    codebook: Float[Array, "codes code_channels"]
    from_codes: Convolution
    decoder: Network


def vqgan_params(config: VQGANConfig) -> VQGAN:
    """Declare every weight once, as a tree of `ParamSpec`."""
    channels, latent = config.channels, config.latent_channels
    shape = (config.codebook_size, config.code_channels)
    entries = _scalar_entries(config.scalar_levels) if config.scalar_levels else normal(1.0)
    codebook: Any = ParamSpec(shape, ("codes", "channels"), entries)
    blocks, deepest = config.residual_blocks, channels[-1]
    colors = 3 * config.patch_size**2
    inward = (config.hidden_channels, *channels)
    windows = (1, 2) if config.local_encoder else (3, 3)
    return VQGAN(
        encoder=_network(blocks, colors, inward, latent, deepest, windows),
        to_codes=_convolution(1, latent, config.code_channels),
        codebook=codebook,
        from_codes=_convolution(1, config.code_channels, latent),
        decoder=_network(blocks + 1, latent, (deepest, *channels[::-1]), colors, deepest, (3, 3)),
    )


def _scalar_entries(levels: tuple[int, ...]) -> Initializer:
    """Return an initializer of all combinations of evenly spaced values in [-1, 1]."""

    def entries(key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
        del key
        values = jnp.meshgrid(*(jnp.linspace(-1, 1, count) for count in levels), indexing="ij")
        return jnp.stack(values, axis=-1).reshape(shape).astype(dtype)

    return entries


def _channels(initializer: Initializer, channels: int) -> Any:
    return ParamSpec((channels,), ("channels",), initializer)


def _convolution(window: int, inward: int, outward: int) -> Convolution:
    axes = ("window", "window", "channels", "channels")
    weights: Any = ParamSpec((window, window, inward, outward), axes, kernel())
    return Convolution(kernel=weights, bias=_channels(zeros(), outward))


def _norm(channels: int) -> Norm:
    return Norm(scale=_channels(ones(), channels), bias=_channels(zeros(), channels))


def _block(window: int, inward: int, outward: int) -> ResidualBlock:
    return ResidualBlock(
        norm_in=_norm(inward),
        conv_in=_convolution(window, inward, outward),
        norm_out=_norm(outward),
        conv_out=_convolution(window, outward, outward),
        skip=None if inward == outward else _convolution(1, inward, outward),
    )


def _network(
    blocks: int,
    inward: int,
    channels: tuple[int, ...],
    outward: int,
    middle: int,
    windows: tuple[int, int],
) -> Network:
    """Declare a network; `channels` is first that of `conv_in`, then of each level in order.

    The second of `windows` is that of convolutions to another resolution.
    """
    window, resampling = windows
    levels = [
        Level(
            blocks=tuple(_block(window, *pair) for pair in pairwise((before, *[width] * blocks))),
            resample=_convolution(resampling, width, width),
        )
        for before, width in pairwise(channels)
    ]
    return Network(
        conv_in=_convolution(window, inward, channels[0]),
        levels=(*levels[:-1], replace(levels[-1], resample=None)),
        middle=(_block(window, middle, middle),) * 2,
        norm=_norm(channels[-1]),
        conv_out=_convolution(window, channels[-1], outward),
    )


def encode_latents(weights: VQGAN, pixels: _Images, config: VQGANConfig) -> _Latents:
    """Encode images to latents, before each place takes its nearest entry."""
    network, local = weights.encoder, config.local_encoder
    x = _convolve(network.conv_in, _fold(pixels, config.patch_size))
    for level in network.levels:
        x = _blocks(level.blocks, x, config, local)
        if level.resample is not None:
            if not local:
                # Pad one row at the bottom and one column at the right, as the original does.
                x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
            x = _convolve(level.resample, x, stride=2)
    x = _blocks(network.middle, x, config, local)
    x = _convolve(network.conv_out, _activate(network.norm, x, config, local))
    latents = _convolve(weights.to_codes, x)
    return jnp.tanh(latents) if config.scalar_levels else latents


def nearest_codes(codebook: Float[Array, "codes code_channels"], latents: _Latents) -> _Codes:
    """Return the first entry of least Euclidean distance at each place."""
    # The square of the latent, equal for all entries, is omitted. The product is exact, so that
    # codes do not depend on the device.
    products = jnp.einsum("brcd,kd->brck", latents, codebook, precision="highest")
    return jnp.argmin((codebook**2).sum(-1) - 2 * products, axis=-1).astype(jnp.int32)


def decode_latents(weights: VQGAN, entries: _Latents, config: VQGANConfig) -> _Images:
    """Decode entries of the codebook to images that are not yet clipped to [-1, 1]."""
    network = weights.decoder
    x = _convolve(network.conv_in, _convolve(weights.from_codes, entries))
    x = _blocks(network.middle, x, config)
    for level in network.levels:
        x = _blocks(level.blocks, x, config)
        if level.resample is not None:
            x = _convolve(level.resample, _double(x))
    x = _convolve(network.conv_out, _activate(network.norm, x, config))
    return _unfold(x, config.patch_size)


def encode_images(weights: VQGAN, pixels: _Images, config: VQGANConfig) -> _Codes:
    """Return the codes of images whose sides are multiples of `downsampling`."""
    return nearest_codes(weights.codebook, encode_latents(weights, pixels, config))


def decode_images(weights: VQGAN, codes: _Codes, config: VQGANConfig) -> _Images:
    """Return the images of codes."""
    return jnp.clip(decode_latents(weights, weights.codebook[codes], config), -1, 1)


def _convolve(weights: Convolution, x: Array, *, stride: int = 1) -> Array:
    """Convolve; with a stride, only where the window lies inside the image."""
    padding, layout = "SAME" if stride == 1 else "VALID", ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        x, weights.kernel, (stride, stride), padding, dimension_numbers=layout
    )
    return x + weights.bias


def _fold(pixels: Array, side: int) -> Array:
    """Make squares of pixels channels of one place."""
    batch, height, width, colors = pixels.shape
    squares = pixels.reshape(batch, height // side, side, width // side, side, colors)
    return squares.swapaxes(2, 3).reshape(batch, height // side, width // side, -1)


def _unfold(x: Array, side: int) -> Array:
    """Invert `_fold`."""
    batch, rows, columns, channels = x.shape
    squares = x.reshape(batch, rows, columns, side, side, channels // side**2).swapaxes(2, 3)
    return squares.reshape(batch, rows * side, columns * side, -1)


def _double(x: Array) -> Array:
    # Repeat each pixel by a broadcast, since the gradient of a repetition is a slow scatter.
    batch, height, width, channels = x.shape
    repeated = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return repeated.reshape(batch, 2 * height, 2 * width, channels)


def _activate(weights: Norm, x: Array, config: VQGANConfig, local: bool = False) -> Array:
    """Apply SiLU after normalizing by mean and variance over all places and a group's channels,
    or over a group's channels of each place if `local`."""
    channels = x.shape[-1]
    places = x.reshape(-1, 1, channels) if local else x.reshape(x.shape[0], -1, channels)
    groups, count = config.norm_groups, places.shape[1]
    share = groups / (count * channels)

    def mean(y: Array) -> Array:
        # Sum over places first: a CPU is fast at whole rows of channels and slow at groups.
        sums = y.sum(axis=1).reshape(-1, groups, channels // groups).sum(axis=-1) * share
        return jnp.repeat(sums, channels // groups, axis=-1)[:, None]

    centered = places - mean(places)
    scaled = centered * jax.lax.rsqrt(mean(centered**2) + _NORM_EPSILON)
    return jax.nn.silu(scaled.reshape(x.shape) * weights.scale + weights.bias)


def _blocks(
    blocks: tuple[ResidualBlock, ...], x: Array, config: VQGANConfig, local: bool = False
) -> Array:
    for block in blocks:
        inner = _convolve(block.conv_in, _activate(block.norm_in, x, config, local))
        inner = _convolve(block.conv_out, _activate(block.norm_out, inner, config, local))
        x = inner + (x if block.skip is None else _convolve(block.skip, x))
    return x
