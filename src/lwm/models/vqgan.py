"""The VQGAN: a picture as a small grid of codes, and back.

A convolutional encoder, a codebook in which each place of the grid takes its nearest entry, and a
decoder that mirrors the encoder. Weights are a dataclass tree, so every size follows from the
configuration. Knows arrays and pixels in [-1, 1]; knows nothing of files, batches of any length or
learning.

Sources: Esser et al. 2021 (arXiv 2012.09841), sections 3.1 and A; the LargeWorldModel paper
(arXiv 2402.08268), section 4.1, for the sizes.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lwm.core.errors import ConfigError
from lwm.core.params import ParamSpec, kernel, normal, ones, zeros

NORM_EPSILON = 1e-6
_MAX_LEVELS, _MAX_BLOCKS = 12, 64
"""A configuration that claims more is broken, and must not be built to find out."""


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """Sizes of one VQGAN; the defaults are the original's."""

    image_size: int = 256
    """Height and width of the pictures it is meant for; others work if `downsampling` divides
    them."""
    hidden_channels: int = 128
    """Channels at full resolution."""
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4, 6)
    """Channels of each level in units of `hidden_channels`; each level but the last halves the
    picture."""
    residual_blocks: int = 2
    """Blocks of a level of the encoder; the decoder has one more."""
    latent_channels: int = 64
    """Channels between encoder and codebook."""
    codebook_size: int = 8192
    """Entries to choose from."""
    code_channels: int = 64
    """Numbers in an entry."""
    norm_groups: int = 32
    """Groups of channels that are normalised together."""

    def __post_init__(self) -> None:
        for name in (
            "image_size", "hidden_channels", "residual_blocks", "latent_channels",
            "codebook_size", "code_channels", "norm_groups",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"vqgan.{name} is {getattr(self, name)}; it must be at least 1")
        if not 1 <= len(self.channel_multipliers) <= _MAX_LEVELS:
            raise ConfigError(
                f"vqgan.channel_multipliers has {len(self.channel_multipliers)} levels; it must "
                f"have 1 to {_MAX_LEVELS}"
            )
        if min(self.channel_multipliers) < 1:
            raise ConfigError(
                f"vqgan.channel_multipliers is {self.channel_multipliers}; each must be at least 1"
            )
        if self.residual_blocks > _MAX_BLOCKS:
            raise ConfigError(
                f"vqgan.residual_blocks is {self.residual_blocks}; more than {_MAX_BLOCKS} is no "
                "VQGAN"
            )
        if self.hidden_channels % self.norm_groups:
            raise ConfigError(
                f"vqgan.norm_groups is {self.norm_groups}, which does not divide "
                f"vqgan.hidden_channels ({self.hidden_channels}); choose a divisor"
            )
        if self.image_size % self.downsampling:
            raise ConfigError(
                f"vqgan.image_size is {self.image_size}; it must be a multiple of "
                f"{self.downsampling}, by which {len(self.channel_multipliers)} levels shrink it"
            )

    @property
    def channels(self) -> tuple[int, ...]:
        """Of each level, from full resolution down."""
        return tuple(self.hidden_channels * factor for factor in self.channel_multipliers)

    @property
    def downsampling(self) -> int:
        """Pixels of a side that one code stands for."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def codes_per_side(self) -> int:
        return self.image_size // self.downsampling

    @property
    def codes_per_frame(self) -> int:
        """Codes of one picture of `image_size`."""
        return self.codes_per_side**2


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Convolution:
    """Kernel (height, width, in, out) and bias."""

    kernel: Float[Array, "height width in out"]
    bias: Float[Array, " out"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Norm:
    """What a group normalisation multiplies by and adds."""

    scale: Float[Array, " channels"]
    bias: Float[Array, " channels"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ResidualBlock:
    """Two convolutions, each behind a norm; `skip` where the number of channels changes."""

    norm_in: Norm
    conv_in: Convolution
    norm_out: Norm
    conv_out: Convolution
    skip: Convolution | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Level:
    """Blocks at one resolution, and the way to the next; `resample` is None at the last."""

    blocks: tuple[ResidualBlock, ...]
    resample: Convolution | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Network:
    """An encoder or a decoder; levels stand in the order in which they are used."""

    conv_in: Convolution
    levels: tuple[Level, ...]
    middle: tuple[ResidualBlock, ...]
    norm: Norm
    conv_out: Convolution


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class VQGAN:
    """All weights."""

    encoder: Network
    to_codes: Convolution
    codebook: Float[Array, "codes code_channels"]
    from_codes: Convolution
    decoder: Network


def vqgan_params(config: VQGANConfig) -> VQGAN:
    """Declares every weight once, as a tree of `ParamSpec`."""
    channels = config.channels
    codebook: Any = ParamSpec(
        (config.codebook_size, config.code_channels), ("codes", "channels"), normal(1.0)
    )
    return VQGAN(
        encoder=_network(
            config.residual_blocks,
            3,
            (config.hidden_channels, *channels),
            config.latent_channels,
            deepest=channels[-1],
        ),
        to_codes=_convolution(1, config.latent_channels, config.code_channels),
        codebook=codebook,
        from_codes=_convolution(1, config.code_channels, config.latent_channels),
        decoder=_network(
            config.residual_blocks + 1,
            config.latent_channels,
            (channels[-1], *channels[::-1]),
            3,
            deepest=channels[-1],
        ),
    )


def _convolution(window: int, inward: int, outward: int) -> Convolution:
    weights: Any = ParamSpec(
        (window, window, inward, outward), ("window", "window", "channels", "channels"), kernel()
    )
    bias: Any = ParamSpec((outward,), ("channels",), zeros())
    return Convolution(kernel=weights, bias=bias)


def _norm(channels: int) -> Norm:
    scale: Any = ParamSpec((channels,), ("channels",), ones())
    bias: Any = ParamSpec((channels,), ("channels",), zeros())
    return Norm(scale=scale, bias=bias)


def _block(inward: int, outward: int) -> ResidualBlock:
    return ResidualBlock(
        norm_in=_norm(inward),
        conv_in=_convolution(3, inward, outward),
        norm_out=_norm(outward),
        conv_out=_convolution(3, outward, outward),
        skip=None if inward == outward else _convolution(1, inward, outward),
    )


def _network(
    blocks: int, inward: int, channels: tuple[int, ...], outward: int, *, deepest: int
) -> Network:
    """Args:
    channels: behind the first convolution, then of each level in the order of use.
    deepest: channels of the middle.
    """
    levels = []
    for before, width in pairwise(channels):
        widths = (before, *[width] * blocks)
        last = len(levels) == len(channels) - 2
        levels.append(
            Level(
                blocks=tuple(_block(*pair) for pair in pairwise(widths)),
                resample=None if last else _convolution(3, width, width),
            )
        )
    middle = _block(deepest, deepest)
    return Network(
        conv_in=_convolution(3, inward, channels[0]),
        levels=tuple(levels),
        middle=(middle, middle),
        norm=_norm(channels[-1]),
        conv_out=_convolution(3, channels[-1], outward),
    )


def encode_latents(
    weights: VQGAN, pixels: Float[Array, "batch height width 3"], config: VQGANConfig
) -> Float[Array, "batch rows columns code_channels"]:
    """What the encoder makes of pictures, before each place takes its nearest entry."""
    network = weights.encoder
    x = convolve(network.conv_in, pixels)
    for level in network.levels:
        x = _blocks(level.blocks, x, config)
        if level.resample is not None:
            x = _halve(level.resample, x)
    x = _blocks(network.middle, x, config)
    x = convolve(network.conv_out, jax.nn.silu(normalise(network.norm, x, config.norm_groups)))
    return convolve(weights.to_codes, x)


def nearest_codes(
    codebook: Float[Array, "codes code_channels"],
    latents: Float[Array, "batch rows columns code_channels"],
) -> Int[Array, "batch rows columns"]:
    """The entry of least Euclidean distance at each place; of equal ones the first."""
    # The square of the latent itself is left out: it is the same for all entries. The product is
    # exact everywhere, so that codes do not depend on the device.
    products = jnp.einsum("brcd,kd->brck", latents, codebook, precision="highest")
    return jnp.argmin((codebook**2).sum(-1) - 2 * products, axis=-1).astype(jnp.int32)


def decode_latents(
    weights: VQGAN,
    entries: Float[Array, "batch rows columns code_channels"],
    config: VQGANConfig,
) -> Float[Array, "batch height width 3"]:
    """Pictures from entries of the codebook, not yet clipped to [-1, 1]."""
    network = weights.decoder
    x = convolve(network.conv_in, convolve(weights.from_codes, entries))
    x = _blocks(network.middle, x, config)
    for level in network.levels:
        x = _blocks(level.blocks, x, config)
        if level.resample is not None:
            x = convolve(level.resample, _double(x))
    return convolve(network.conv_out, jax.nn.silu(normalise(network.norm, x, config.norm_groups)))


def encode_images(
    weights: VQGAN, pixels: Float[Array, "batch height width 3"], config: VQGANConfig
) -> Int[Array, "batch rows columns"]:
    """Codes of pictures in [-1, 1]; `downsampling` must divide their sides."""
    return nearest_codes(weights.codebook, encode_latents(weights, pixels, config))


def decode_images(
    weights: VQGAN, codes: Int[Array, "batch rows columns"], config: VQGANConfig
) -> Float[Array, "batch height width 3"]:
    """Pictures in [-1, 1] of codes."""
    return jnp.clip(decode_latents(weights, weights.codebook[codes], config), -1, 1)


def convolve(
    weights: Convolution, x: Float[Array, "batch height width in"], *, stride: int = 1
) -> Float[Array, "batch rows columns out"]:
    """With a stride only places that the window covers whole, without one all of them."""
    x = jax.lax.conv_general_dilated(
        x,
        weights.kernel,
        (stride, stride),
        "SAME" if stride == 1 else "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return x + weights.bias


def _halve(weights: Convolution, x: Array) -> Array:
    # One row and one column at the bottom and the right, as the original pads.
    return convolve(weights, jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))), stride=2)


def _double(x: Array) -> Array:
    # Each pixel four times. As a broadcast, since the gradient of a repetition is a slow scatter.
    batch, height, width, channels = x.shape
    wide = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return wide.reshape(batch, 2 * height, 2 * width, channels)


def normalise(
    weights: Norm, x: Float[Array, "batch height width channels"], groups: int
) -> Float[Array, "batch height width channels"]:
    """Group normalisation: mean and variance over places and a group's channels."""
    batch, height, width, channels = x.shape
    places = x.reshape(batch, height * width, channels)
    share = groups / (height * width * channels)

    def mean(y: Array) -> Array:
        # Over places first: a CPU sums whole rows of channels quickly, and groups of them slowly.
        sums = y.sum(axis=1).reshape(batch, groups, channels // groups).sum(axis=-1) * share
        return jnp.repeat(sums, channels // groups, axis=-1)[:, None]

    centred = places - mean(places)
    scaled = centred * jax.lax.rsqrt(mean(centred**2) + NORM_EPSILON)
    return scaled.reshape(x.shape) * weights.scale + weights.bias


def _blocks(blocks: tuple[ResidualBlock, ...], x: Array, config: VQGANConfig) -> Array:
    for block in blocks:
        inner = jax.nn.silu(normalise(block.norm_in, x, config.norm_groups))
        inner = convolve(block.conv_in, inner)
        inner = jax.nn.silu(normalise(block.norm_out, inner, config.norm_groups))
        inner = convolve(block.conv_out, inner)
        x = inner + (x if block.skip is None else convolve(block.skip, x))
    return x
