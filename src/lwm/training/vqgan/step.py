"""One step of learning a VQGAN: reconstruct, choose, follow.

Pure and compiled; the loop around it is the one for text. Knows the VQGAN and its losses; knows no
files and no pictures but in batches.

Source: Esser et al. 2021 (arXiv 2012.09841), section 3.1.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from lwm.core import params
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
from lwm.training.optimizer import OptimizerConfig, make_optimizer
from lwm.training.vqgan.codebook import (
    CodebookConfig,
    Usage,
    averaged,
    counted,
    perplexity,
    revived,
    unused,
)


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """What a reconstruction is measured by; weights of a sum."""

    absolute: float = 1.0
    """Of the mean absolute error (L1)."""
    squared: float = 1.0
    """Of the mean squared error (L2)."""
    structure: float = 0.0
    """Of 1 - SSIM, a perceptual term; 0 leaves it out."""

    def __post_init__(self) -> None:
        weights = (self.absolute, self.squared, self.structure)
        if min(weights) < 0 or not sum(weights) > 0:
            raise ConfigError(
                f"reconstruction.absolute, squared and structure are {weights}; none may be below "
                "0 and one must be above"
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class VqganBatch:
    """Pictures in [-1, 1]; a weight of 0 marks one that only fills the batch up."""

    pixels: Float[Array, "batch height width 3"]
    weights: Float[Array, " batch"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class VqganState:
    """What learning changes; `step` counts batches seen."""

    weights: VQGAN
    usage: Usage
    optimizer: Any
    step: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class VqganMetrics:
    """Figures of one step, float32 scalars.

    Args:
        loss: what was minimised.
        used: entries that the batch chose.
        revived: entries that were dead and got a new value.
    """

    loss: Float[Array, ""]
    reconstruction: Float[Array, ""]
    commitment: Float[Array, ""]
    psnr: Float[Array, ""]
    ssim: Float[Array, ""]
    used: Float[Array, ""]
    perplexity: Float[Array, ""]
    revived: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    skipped: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class VqganSums:
    """Sums over the pictures of an evaluation, and the places that chose each entry."""

    loss: Float[Array, ""]
    psnr: Float[Array, ""]
    ssim: Float[Array, ""]
    pictures: Float[Array, ""]
    counts: Float[Array, " codes"]


@dataclass(frozen=True, kw_only=True)
class VqganPlan:
    """How a VQGAN learns on a mesh; rows are spread over its data and fsdp axes.

    Args:
        steps: length of the run, which the learning rate follows.
        seed: of the random weights, and of which latents revive dead entries.
    """

    config: VQGANConfig
    mesh: Mesh
    optimizer: OptimizerConfig
    codebook: CodebookConfig
    reconstruction: ReconstructionConfig
    steps: int
    seed: int

    @property
    def specs(self) -> VQGAN:
        return vqgan_params(self.config)

    @property
    def _everywhere(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def _transformation(self) -> optax.GradientTransformation:
        return make_optimizer(self.optimizer, self.specs, self.steps)

    def first_state(self, weights: VQGAN | None = None) -> VqganState:
        """The state before the first step, with random weights unless some are given."""

        def begin(weights: Any) -> VqganState:
            usage = unused(self.config.codebook_size, self.config.code_channels)
            if not random:  # entries that have learnt something count as living
                counts = jnp.ones_like(usage.counts)
                usage = Usage(counts=counts, sums=weights.codebook)
            return VqganState(
                weights=weights,
                usage=usage,
                optimizer=self._transformation().init(weights),
                step=jnp.zeros((), jnp.int32),
            )

        random = weights is None
        if random:
            weights = params.initialize(self.specs, jax.random.key(self.seed), jnp.float32)
        return jax.jit(begin, out_shardings=self._everywhere)(weights)

    def template(self) -> VqganState:
        """Shapes, types and shardings of the state."""
        state = jax.eval_shape(self.first_state)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._everywhere), state
        )

    def place(self, local: dict[str, Any]) -> VqganBatch:
        rows = NamedSharding(self.mesh, partition_spec(("batch",), TRAINING))
        return VqganBatch(**{name: jax.device_put(x, rows) for name, x in local.items()})

    def step(self) -> Any:
        """The compiled step: (state, None, batch) -> (state, metrics)."""
        return jax.jit(
            partial(self._step, optimizer=self._transformation()),
            donate_argnums=0,
            out_shardings=self._everywhere,
        )

    def evaluate(self) -> Any:
        """The compiled measurement: (state, None, batch) -> sums."""
        return jax.jit(self._evaluate, out_shardings=self._everywhere)

    def _step(
        self,
        state: VqganState,
        _: None,
        batch: VqganBatch,
        *,
        optimizer: optax.GradientTransformation,
    ) -> tuple[VqganState, VqganMetrics]:
        (loss, told), gradient = jax.value_and_grad(self._loss, has_aux=True)(
            state.weights, batch.pixels
        )
        flat = told["latents"].reshape(-1, self.config.code_channels)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        before: Any = state.weights
        change, memory = optimizer.update(gradient, state.optimizer, before)
        weights: Any = optax.apply_updates(before, change)
        usage, counts = counted(state.usage, flat, told["codes"].ravel(), self.codebook.decay)
        codebook = weights.codebook
        if self.codebook.learning == "average":
            codebook = averaged(usage, codebook)
        # The seed and the step alone decide, so that a resumed run draws the same.
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        dead_below = self.codebook.dead_below * len(flat) / len(codebook)
        codebook, usage, dead = revived(codebook, usage, flat, key, dead_below)
        learnt = (replace(weights, codebook=codebook), usage, memory)
        weights, usage, memory = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            learnt,
            (state.weights, state.usage, state.optimizer),
        )
        metrics = VqganMetrics(
            loss=loss,
            reconstruction=told["reconstruction"],
            commitment=told["commitment"],
            psnr=psnr(batch.pixels, told["pixels"]).mean(),
            ssim=ssim(batch.pixels, told["pixels"]).mean(),
            used=(counts > 0).sum(dtype=jnp.float32),
            perplexity=perplexity(counts),
            revived=dead,
            gradient_norm=norm,
            skipped=1.0 - finite,
        )
        after = VqganState(weights=weights, usage=usage, optimizer=memory, step=state.step + 1)
        return after, metrics

    def _loss(
        self, weights: VQGAN, pixels: Float[Array, "batch height width 3"]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        found = encode_latents(weights, pixels, self.config)
        codes = nearest_codes(weights.codebook, jax.lax.stop_gradient(found))
        entries = weights.codebook[codes]
        commitment = ((found - jax.lax.stop_gradient(entries)) ** 2).mean()
        loss = self.codebook.commitment * commitment
        if self.codebook.learning == "gradient":
            loss += ((jax.lax.stop_gradient(found) - entries) ** 2).mean()
        # Straight through: the decoder sees entries, the encoder gets the decoder's gradient.
        through = found + jax.lax.stop_gradient(entries - found)
        back = decode_latents(weights, through, self.config)
        reconstruction = self._reconstruction(pixels, back).mean()
        return loss + reconstruction, {
            "latents": jax.lax.stop_gradient(found),
            "codes": codes,
            "pixels": jnp.clip(back, -1, 1),
            "reconstruction": reconstruction,
            "commitment": commitment,
        }

    def _reconstruction(self, pixels: Array, back: Array) -> Float[Array, " batch"]:
        weigh, error = self.reconstruction, pixels - back
        loss = weigh.absolute * jnp.abs(error).mean(axis=(1, 2, 3))
        loss += weigh.squared * (error**2).mean(axis=(1, 2, 3))
        if weigh.structure:
            loss += weigh.structure * (1 - ssim(pixels, back))
        return loss

    def _evaluate(self, state: VqganState, _: None, batch: VqganBatch) -> VqganSums:
        weights = state.weights
        codes = nearest_codes(weights.codebook, encode_latents(weights, batch.pixels, self.config))
        back = jnp.clip(decode_latents(weights, weights.codebook[codes], self.config), -1, 1)
        places = jnp.broadcast_to(batch.weights[:, None, None], codes.shape)
        return VqganSums(
            loss=batch.weights @ self._reconstruction(batch.pixels, back),
            psnr=batch.weights @ psnr(batch.pixels, back),
            ssim=batch.weights @ ssim(batch.pixels, back),
            pictures=batch.weights.sum(),
            counts=jnp.zeros(self.config.codebook_size).at[codes].add(places),
        )
