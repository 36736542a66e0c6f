"""Train a VQGAN with the same loop as the language model.

Sources: Esser et al. 2021 (arXiv 2012.09841), section 3.1; for the codebook's moving averages, van
den Oord et al. 2017 (arXiv 1711.00937), appendix A.1; for the revival of unused entries, Dhariwal
et al. 2020 (arXiv 2005.00341), section 3.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge, Lt
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lwm.core.config import Checked
from lwm.core.errors import ConfigError
from lwm.core.pytree import pytree
from lwm.core.sharding import TRAINING, partition_spec
from lwm.models.likeness import psnr, ssim
from lwm.models.vqgan import (
    VQGAN,
    VQGANConfig,
    decode_latents,
    encode_latents,
    nearest_codes,
    vqgan_params,
)
from lwm.training.training import Tally, Training, TrainState, select_finite


@dataclass(frozen=True, kw_only=True)
class CodebookConfig(Checked, section="codebook"):
    """Set how codebook entries are trained."""

    learning: Literal["average", "gradient"] = "average"
    """Set entries to moving averages of the latents that choose them, or train them by the
    gradient of the codebook loss."""
    decay: Annotated[float, Ge(0), Lt(1)] = 0.99
    """Decay rate of the moving averages, per step."""
    commitment: Annotated[float, Ge(0)] = 0.25
    """Weight of the loss that moves latents toward their entries."""
    dead_below: Annotated[float, Ge(0)] = 0.1
    """An entry whose moving average of use falls below this share of even use takes the value of a
    random latent; 0 disables this."""


@pytree
class Usage:
    """Hold, for each entry, moving averages of how often it is chosen and of its latents' sum."""

    counts: Float[Array, " codes"]
    sums: Float[Array, "codes channels"]


def update_usage(
    usage: Usage,
    latents: Float[Array, "places channels"],
    codes: Int[Array, " places"],
    decay: float,
) -> tuple[Usage, Float[Array, " codes"]]:
    """Return the averages after one more step, and how often each entry was chosen in it."""
    counts = jnp.zeros_like(usage.counts).at[codes].add(1.0)
    sums = jnp.zeros_like(usage.sums).at[codes].add(latents)
    return Usage(
        counts=decay * usage.counts + (1 - decay) * counts,
        sums=decay * usage.sums + (1 - decay) * sums,
    ), counts


def average_entries(usage: Usage, codebook: Float[Array, "codes channels"]) -> Array:
    """Return entries as means of the latents that chose them; entries never chosen stay."""
    counts = usage.counts[:, None]
    return jnp.where(counts > 0, usage.sums / jnp.where(counts > 0, counts, 1.0), codebook)


def revive_entries(
    codebook: Float[Array, "codes channels"],
    usage: Usage,
    latents: Float[Array, "places channels"],
    key: PRNGKeyArray,
    dead_below: float,
) -> tuple[Float[Array, "codes channels"], Usage, Float[Array, ""]]:
    """Give entries with fewer than `dead_below` places per step the values of random latents.

    Returns codebook, usage, and the number of revived entries. A revived entry counts as chosen
    by twice `dead_below` places, which gives it time to be chosen.
    """
    dead = usage.counts < dead_below
    chosen = latents[jax.random.randint(key, dead.shape, 0, len(latents))]
    count = 2 * dead_below
    counts = jnp.where(dead, count, usage.counts)
    sums = jnp.where(dead[:, None], count * chosen, usage.sums)
    codebook = jnp.where(dead[:, None], chosen, codebook)
    return codebook, Usage(counts=counts, sums=sums), dead.sum(dtype=jnp.float32)


def codebook_perplexity(counts: Float[Array, " codes"]) -> Float[Array, ""]:
    """Compute the number of entries that, evenly used, would carry as much information."""
    shares = counts / jnp.maximum(counts.sum(), 1.0)
    logs = jnp.log(jnp.where(shares > 0, shares, 1))
    return jnp.exp(-jnp.sum(jnp.where(shares > 0, shares * logs, 0)))


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig(Checked, section="reconstruction"):
    """Set the weights of the terms of the reconstruction loss."""

    absolute: Annotated[float, Ge(0)] = 1.0
    """Weight of the mean absolute error (L1)."""
    squared: Annotated[float, Ge(0)] = 1.0
    """Weight of the mean squared error (L2)."""
    structure: Annotated[float, Ge(0)] = 0.0
    """Weight of 1 - SSIM, a perceptual term; 0 omits it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.absolute + self.squared + self.structure > 0:
            raise ConfigError("the weights of reconstruction are all 0; raise one of them")


def _reconstruction_loss(
    pixels: Float[Array, "batch height width 3"],
    reconstruction: Float[Array, "batch height width 3"],
    config: ReconstructionConfig,
) -> Float[Array, " batch"]:
    error = pixels - reconstruction
    loss = config.absolute * jnp.abs(error).mean(axis=(1, 2, 3))
    loss += config.squared * (error**2).mean(axis=(1, 2, 3))
    if config.structure:
        loss += config.structure * (1 - ssim(pixels, reconstruction))
    return loss


@pytree
class VqganState(TrainState):
    """Hold what a step changes, with the usage of the codebook's entries."""

    usage: Usage


@dataclass(frozen=True, kw_only=True)
class VqganTraining(Training):
    """Train a VQGAN on `pixels` in [-1, 1]; images of weight 0 only fill up an evaluation batch.

    `seed` also chooses the latents that revive dead entries.
    """

    step_note: ClassVar[str] = (
        "loss {loss:.4f}, PSNR {psnr:.2f} dB, {used:,.0f} entries used, "
        "{images_per_second:,.1f} images/s"
    )
    evaluation_note: ClassVar[str] = (
        "held-out PSNR {psnr:.2f} dB, SSIM {ssim:.3f}, {used:,} entries used, "
        "perplexity {perplexity:,.0f}"
    )

    config: VQGANConfig
    codebook: CodebookConfig = CodebookConfig()
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    weights: VQGAN | None = None

    @property
    def specs(self) -> VQGAN:
        return vqgan_params(self.config)

    def initial_state(self, weights: Any) -> VqganState:
        counts, sums = jnp.zeros(self.config.codebook_size), jnp.zeros_like(weights.codebook)
        if self.weights is not None:  # trained entries do not count as dead
            counts, sums = jnp.ones_like(counts), weights.codebook
        return VqganState(
            weights=weights,
            usage=Usage(counts=counts, sums=sums),
            optimizer=self.transformation.init(weights),
            step=jnp.zeros((), jnp.int32),
        )

    def initial_weights(self) -> VQGAN:
        if self.weights is None:
            return super().initial_weights()
        return jax.device_put(self.weights, self.replicated)

    def place(self, local: Mapping[str, np.ndarray]) -> dict[str, Array]:
        rows = NamedSharding(self.mesh, partition_spec(("batch",), TRAINING))
        return {name: jax.device_put(x, rows) for name, x in local.items()}

    def train_step(
        self, state: VqganState, frozen: None, batch: dict[str, Array]
    ) -> tuple[VqganState, dict[str, Array]]:
        (loss, result), gradient = jax.value_and_grad(self._loss, has_aux=True)(
            state.weights, batch["pixels"]
        )
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        change, moments = self.transformation.update(gradient, state.optimizer, state.weights)
        weights: Any = optax.apply_updates(state.weights, change)
        codebook, usage, counts, revived = self._update_codebook(state, weights.codebook, result)
        weights, usage, moments = select_finite(
            finite,
            (replace(weights, codebook=codebook), usage, moments),
            (state.weights, state.usage, state.optimizer),
        )
        metrics = {
            "loss": loss,
            "reconstruction": result["reconstruction"],
            "commitment": result["commitment"],
            "psnr": psnr(batch["pixels"], result["pixels"]).mean(),
            "ssim": ssim(batch["pixels"], result["pixels"]).mean(),
            "used": (counts > 0).sum(dtype=jnp.float32),
            "perplexity": codebook_perplexity(counts),
            "revived": revived,
            "gradient_norm": norm,
            "skipped": 1.0 - finite,
        }
        after = VqganState(weights=weights, usage=usage, optimizer=moments, step=state.step + 1)
        return after, metrics

    def _update_codebook(
        self, state: VqganState, codebook: Array, result: dict[str, Array]
    ) -> tuple[Array, Usage, Array, Array]:
        # Entries, usage, how often each was chosen, and the number of revived ones.
        usage, counts = update_usage(
            state.usage, result["latents"], result["codes"], self.codebook.decay
        )
        if self.config.scalar_levels:  # the entries are fixed
            return state.weights.codebook, usage, counts, jnp.zeros(())
        if self.codebook.learning == "average":
            codebook = average_entries(usage, codebook)
        # The key depends only on seed and step, so that a resumed run revives the same entries.
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        dead_below = self.codebook.dead_below * len(result["latents"]) / len(codebook)
        codebook, usage, revived = revive_entries(
            codebook, usage, result["latents"], key, dead_below
        )
        return codebook, usage, counts, revived

    def _loss(
        self, weights: VQGAN, pixels: Float[Array, "batch height width 3"]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        encoded = encode_latents(weights, pixels, self.config)
        codes = nearest_codes(weights.codebook, jax.lax.stop_gradient(encoded))
        entries = weights.codebook[codes]
        commitment = ((encoded - jax.lax.stop_gradient(entries)) ** 2).mean()
        # Scalars need no commitment: each is within half a step of its value.
        loss = 0.0 if self.config.scalar_levels else self.codebook.commitment * commitment
        if self.codebook.learning == "gradient" and not self.config.scalar_levels:
            loss += ((jax.lax.stop_gradient(encoded) - entries) ** 2).mean()
        # Straight-through estimator: the encoder gets the gradient of the decoder's input.
        decoder_input = encoded + jax.lax.stop_gradient(entries - encoded)
        decoded = decode_latents(weights, decoder_input, self.config)
        reconstruction = _reconstruction_loss(pixels, decoded, self.reconstruction).mean()
        return loss + reconstruction, {
            "latents": jax.lax.stop_gradient(encoded).reshape(-1, self.config.code_channels),
            "codes": codes.ravel(),
            "pixels": jnp.clip(decoded, -1, 1),
            "reconstruction": reconstruction,
            "commitment": commitment,
        }

    def evaluate_batch(
        self, state: VqganState, frozen: None, batch: dict[str, Array]
    ) -> dict[str, Array]:
        weights = state.weights
        codes = nearest_codes(
            weights.codebook, encode_latents(weights, batch["pixels"], self.config)
        )
        decoded = jnp.clip(decode_latents(weights, weights.codebook[codes], self.config), -1, 1)
        places = jnp.broadcast_to(batch["weights"][:, None, None], codes.shape)
        loss = _reconstruction_loss(batch["pixels"], decoded, self.reconstruction)
        return {
            "loss": batch["weights"] @ loss,
            "psnr": batch["weights"] @ psnr(batch["pixels"], decoded),
            "ssim": batch["weights"] @ ssim(batch["pixels"], decoded),
            "images": batch["weights"].sum(),
            "counts": jnp.zeros(self.config.codebook_size).at[codes].add(places),
        }

    def measure(self, local: Mapping[str, np.ndarray]) -> float:
        return float(len(local["pixels"]))

    def step_row(
        self, metrics: Mapping[str, Any], seconds: float, work: float, tally: Tally
    ) -> dict[str, Any]:
        values = {name: float(x) for name, x in metrics.items()}
        return {**values, "images_per_second": work / seconds}

    def evaluation_row(self, sums: Mapping[str, Any]) -> dict[str, float]:
        images, counts = max(float(sums["images"]), 1.0), np.asarray(sums["counts"])
        shares = counts[counts > 0] / max(counts.sum(), 1.0)
        return {
            "loss": float(sums["loss"]) / images,
            "psnr": float(sums["psnr"]) / images,
            "ssim": float(sums["ssim"]) / images,
            "used": int((counts > 0).sum()),
            "perplexity": float(np.exp(-(shares * np.log(shares)).sum())),
        }
