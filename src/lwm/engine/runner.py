"""Hold the weights and the cache on their devices, and run the compiled steps on them."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lwm.attention.cached import LayerCache
from lwm.attention.order import striped
from lwm.core.errors import CapacityError
from lwm.core.memory import require_memory
from lwm.core.mesh import SEQUENCE, pace
from lwm.engine.sampling import History, Sampled, SlotSampling
from lwm.engine.scheduler import Chunk, Copy, Feed
from lwm.engine.steps import compile_steps
from lwm.models.cache import cache_capacity, grow_cache, make_cache, require_cache_memory
from lwm.models.forward import dequantized
from lwm.models.llama import Llama, LlamaConfig
from lwm.models.quantized import QUANTIZED_ROWS, QuantizedKernel, has_quantized

_CHUNKS = (32, 128, 512, 1024)
"""Positions on each device of the `sequence` axis that one prefill step takes."""

_MOST_LAYERS = 5
"""Most layers that one dispatch of a decode step computes."""


def reserved_length(tokens: int, config: LlamaConfig) -> int:
    """Return a length of cache with room to grow within the model's context.

    There are few such lengths, because each one compiles a decode step.
    """
    unit = max(256, 1 << max(0, tokens.bit_length() - 3))
    length = max(1024, -(-tokens // unit) * unit)
    return max(tokens, min(length, config.generation_length))


def weights_for(weights: Llama, slots: int) -> Llama:
    """Return the weights for `slots` requests; quantized ones are fast only for few rows."""
    if slots <= QUANTIZED_ROWS or not has_quantized(weights):
        return weights
    leaves = jax.tree.leaves(weights, is_leaf=lambda x: isinstance(x, QuantizedKernel))
    require_memory(
        4 * sum(math.prod(x.shape) for x in leaves if isinstance(x, QuantizedKernel)),
        None,
        what=f"a float32 copy of the quantized weights, for {slots} slots,",
        remedy=f"run at most {QUANTIZED_ROWS} at a time; guided generation takes two for each",
    )
    return dequantized(weights)


class Runner:
    """Hold the weights and the cache of an engine, and run steps on them; see `Engine`."""

    def __init__(
        self,
        weights: Llama,
        config: LlamaConfig,
        *,
        alone: Llama,
        slots: int,
        tokens: int,
        headroom: bool,
        dtype: str,
        mesh: Mesh | None,
    ) -> None:
        self._weights, self._config, self._slots, self._mesh = weights, config, slots, mesh
        self._sizes: dict[str, Any] = {"slots": slots, "dtype": dtype, "mesh": mesh}
        self._shards = 1 if mesh is None else mesh.shape[SEQUENCE]
        self._alone = alone
        self._steps = compile_steps(config, mesh, weights.norm.dtype)
        # One compiled layer, or a run of a few, serves for all: the cost of compiling a chunk size
        # or a width of drafts does not grow with the model's depth.
        self._run = max(n for n in range(1, _MOST_LAYERS + 1) if config.num_layers % n == 0)
        self._cache: list[LayerCache] = []
        self._history: History | None = None
        self.chunks = [size * self._shards for size in _CHUNKS]
        self.capacity = self.affordable(tokens, headroom)
        self.allocate()

    @property
    def cache(self) -> list[LayerCache]:
        """Return the cache of each layer, which a caller may replace."""
        self.allocate()
        return self._cache

    def allocate(self) -> bool:
        """Make the cache if there is none; return whether a new one was made."""
        if self._cache:
            return False
        self._cache = list(make_cache(self._config, capacity=self.capacity, **self._sizes))
        whole = NamedSharding(self._mesh, PartitionSpec()) if self._mesh else jax.devices()[0]
        shape = self._slots, self._config.table_size
        self._history = History(
            present=jnp.zeros(shape, bool, device=whole),
            answered=jnp.zeros(shape, jnp.int32, device=whole),
        )
        return True

    def release(self) -> None:
        """Free the cache, also where an exception's traceback still refers to it."""
        for array in jax.tree.leaves((self._cache, self._history)):
            array.delete()
        self._cache, self._history = [], None

    def grow(self, capacity: int) -> None:
        """Make the cache longer, keeping its contents."""
        if self._cache:
            self._cache = list(grow_cache(tuple(self._cache), capacity, self._mesh))
        self.capacity = capacity

    def affordable(self, tokens: int, headroom: bool) -> int:
        """Return a capacity with room to grow if it fits into memory, else the least one."""
        if headroom:
            with suppress(CapacityError):
                return self.affordable(reserved_length(tokens, self._config), headroom=False)
        capacity = needed = cache_capacity(tokens, self._mesh)
        if self._cache:
            # While a cache grows, each old layer is freed after the new one is made.
            needed += capacity // self._config.num_layers - self.capacity
        require_cache_memory(self._config, capacity=needed, **self._sizes)
        return capacity

    def set_text(self, slot: int, tokens: Sequence[int], answer: int) -> None:
        """Set the text of a slot, for the penalties; its answer begins at a position.

        The last token is fed to the next step, which counts it.
        """
        size = self._config.table_size
        row = History(present=np.zeros(size, bool), answered=np.zeros(size, np.int32))  # type: ignore[arg-type]
        row.present[list(tokens)] = True  # type: ignore[index]
        np.add.at(row.answered, list(tokens[answer:-1]), 1)  # type: ignore[arg-type]
        self._history = self._steps.set_history(self._history, slot, row)

    def copy(self, copy: Copy) -> None:
        """Copy the keys and values of one slot to another."""
        source, destination = np.int32(copy.source), np.int32(copy.destination)
        for index, layer in enumerate(self._cache):
            self._cache[index] = self._steps.copy_slot(layer, source, destination)
            pace(self._cache[index])

    def prefill(self, chunk: Chunk) -> None:
        """Compute the keys and values of a chunk."""
        tokens = np.zeros(chunk.size, np.int32)
        tokens[: len(chunk.tokens)] = chunk.tokens
        order = striped(chunk.size, self._shards)
        positions = (chunk.first + np.arange(chunk.size, dtype=np.int32))[order]
        x = self._steps.embed(self._weights.embedding, tokens[order][None])
        angles = self._steps.angles(positions[None])
        place = (np.int32(chunk.slot), np.int32(chunk.first))
        layers, cache = self._weights.layers, self._cache
        assert isinstance(layers, tuple)
        last = len(layers) - 1
        # Each layer's cache is donated, and replaced in the list at once, so that `release` finds
        # every array after an interruption.
        for index, layer in enumerate(self._steps.dequantized_layers(layers)):
            if index < last:
                x, cache[index] = self._steps.prefill(layer, x, angles, cache[index], *place)
            else:
                cache[index] = self._steps.prefill_last(layer, x, angles, cache[index], *place)
            pace(cache[index])

    def decode(
        self, feeds: Sequence[Feed], width: int, settings: SlotSampling, *, alone: bool = False
    ) -> Sampled:
        """Compute the next tokens of all slots, `width` of each, and sample a token after each.

        Args:
            alone: compute only the slot of the one feed; settings and result have its row only.
        """
        weights, rows, first_slot = self._weights, self._slots, 0
        if alone:
            weights, rows, first_slot = self._alone, 1, feeds[0].slot
        tokens = np.zeros((rows, width), np.int32)
        positions = np.full((rows, width), -1, np.int32)
        for feed in feeds:
            row, count = feed.slot - first_slot, len(feed.tokens)
            tokens[row, :count] = feed.tokens
            positions[row, :count] = feed.position + np.arange(count)
        x = self._steps.embed_next(weights.embedding, tokens)
        angles = self._steps.angles(np.maximum(positions, 0))
        slot = (np.int32(first_slot),) if alone else ()
        layers, cache = weights.layers, self._cache
        assert isinstance(layers, tuple)
        for first in range(0, len(layers), self._run):
            run = slice(first, first + self._run)
            old = tuple(cache[run])
            x, cache[run] = self._steps.decode(layers[run], x, angles, old, positions, *slot)
            pace(cache[run])
        sample = self._steps.sample_alone if alone else self._steps.sample
        sampled, self._history = sample(
            replace(weights, layers=()), x, self._history, tokens, positions, settings, *slot
        )
        result: Any = jax.device_get(sampled)
        return result
