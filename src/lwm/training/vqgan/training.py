"""Train a VQGAN: reconstruct images, and move codebook entries to the latents that choose them.

Source: Esser et al. 2021 (arXiv 2012.09841), section 3.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from lwm.core.config import Checked
from lwm.core.errors import ConfigError
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
from lwm.training.step import StepMetrics, select_finite
from lwm.training.training import Tally, Training
from lwm.training.vqgan.codebook import (
    CodebookConfig,
    Usage,
    average_entries,
    codebook_perplexity,
    no_usage,
    revive_entries,
    update_usage,
)


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
            raise ConfigError(
                "reconstruction.absolute, squared and structure are all 0; set at least one of "
                "them above 0"
            )


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class VqganBatch:
    """Hold images in [-1, 1]; a weight of 0 marks one that only fills up the batch."""

    pixels: Float[Array, "batch height width 3"]
    weights: Float[Array, " batch"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class VqganState:
    """Hold what a step changes; `step` counts the batches used so far."""

    weights: VQGAN
    usage: Usage
    optimizer: Any
    step: Int[Array, ""]


@dataclass(frozen=True, kw_only=True)
class VqganTraining(Training):
    """Train a VQGAN on images; rows are split over the mesh's data and fsdp axes.

    Args:
        seed: seed of the random weights, and of the latents that revive dead entries.
        weights: weights to start from; None for random ones.
    """

    config: VQGANConfig
    codebook: CodebookConfig = CodebookConfig()
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    weights: VQGAN | None = None

    @property
    def specs(self) -> VQGAN:
        return vqgan_params(self.config)

    @property
    def dtype(self) -> Any:
        return jnp.float32

    @property
    def shardings(self) -> Any:
        return self.replicated

    def initial_state(self, weights: Any) -> VqganState:
        usage = no_usage(self.config.codebook_size, self.config.code_channels)
        if self.weights is not None:  # trained entries do not count as dead
            usage = Usage(counts=jnp.ones_like(usage.counts), sums=weights.codebook)
        return VqganState(
            weights=weights,
            usage=usage,
            optimizer=self.transformation.init(weights),
            step=jnp.zeros((), jnp.int32),
        )

    def initial_weights(self) -> VQGAN:
        if self.weights is None:
            return super().initial_weights()
        return jax.device_put(self.weights, self.replicated)

    def place(self, local: Mapping[str, np.ndarray]) -> VqganBatch:
        rows = NamedSharding(self.mesh, partition_spec(("batch",), TRAINING))
        return VqganBatch(**{name: jax.device_put(x, rows) for name, x in local.items()})

    def train_step(
        self, state: VqganState, frozen: None, batch: VqganBatch
    ) -> tuple[VqganState, StepMetrics]:
        (loss, result), gradient = jax.value_and_grad(self._loss, has_aux=True)(
            state.weights, batch.pixels
        )
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        before: Any = state.weights
        change, moments = self.transformation.update(gradient, state.optimizer, before)
        weights: Any = optax.apply_updates(before, change)
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
            "psnr": psnr(batch.pixels, result["pixels"]).mean(),
            "ssim": ssim(batch.pixels, result["pixels"]).mean(),
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
        """Return entries, usage, how often each was chosen, and the number of revived ones."""
        usage, counts = update_usage(
            state.usage, result["latents"], result["codes"], self.codebook.decay
        )
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
        loss = self.codebook.commitment * commitment
        if self.codebook.learning == "gradient":
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
        self, state: VqganState, frozen: None, batch: VqganBatch
    ) -> dict[str, Array]:
        """Sum over the images, and count how often each entry is chosen."""
        weights = state.weights
        codes = nearest_codes(weights.codebook, encode_latents(weights, batch.pixels, self.config))
        decoded = jnp.clip(decode_latents(weights, weights.codebook[codes], self.config), -1, 1)
        places = jnp.broadcast_to(batch.weights[:, None, None], codes.shape)
        loss = _reconstruction_loss(batch.pixels, decoded, self.reconstruction)
        return {
            "loss": batch.weights @ loss,
            "psnr": batch.weights @ psnr(batch.pixels, decoded),
            "ssim": batch.weights @ ssim(batch.pixels, decoded),
            "images": batch.weights.sum(),
            "counts": jnp.zeros(self.config.codebook_size).at[codes].add(places),
        }

    def measure(self, local: Mapping[str, np.ndarray]) -> float:
        """Count the images of a step."""
        return float(len(local["pixels"]))

    def step_row(
        self, metrics: Mapping[str, Any], seconds: float, work: float, tally: Tally
    ) -> dict[str, Any]:
        values = {name: float(x) for name, x in metrics.items()}
        return {**values, "images_per_second": work / seconds}

    def step_note(self, row: dict[str, Any]) -> str:
        return (
            f"loss {row['loss']:.4f}, PSNR {row['psnr']:.2f} dB, {row['used']:,.0f} entries used, "
            f"{row['images_per_second']:,.1f} images/s"
        )

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

    def evaluation_note(self, row: dict[str, float]) -> str:
        return (
            f"held-out PSNR {row['psnr']:.2f} dB, SSIM {row['ssim']:.3f}, "
            f"{row['used']:,} entries used, perplexity {row['perplexity']:,.0f}"
        )
