"""Put batches from the host onto the mesh; each process reads the rows that its devices need."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from lwm.attention.order import zigzag
from lwm.core.errors import ConfigError
from lwm.core.mesh import SEQUENCE
from lwm.core.pytree import pytree
from lwm.core.sharding import TRAINING, partition_spec, shard_count


@pytree
class Batch:
    """Hold rows of token ids, their positions in any order, and the loss weights of the targets.

    Positions start at 0 in each segment; segment -1 is padding.
    """

    tokens: Int[Array, "*micro rows seq"]
    targets: Int[Array, "*micro rows seq"]
    weights: Float[Array, "*micro rows seq"]
    positions: Int[Array, "*micro rows seq"]
    segments: Int[Array, "*micro rows seq"]


@dataclass(frozen=True)
class BatchLayout:
    """Describe how a global batch [micro, rows, seq] is split over a mesh.

    `batch_size` counts the rows of all microbatches and processes.
    """

    mesh: Mesh
    batch_size: int
    micro: int
    sequence_length: int

    def __post_init__(self) -> None:
        parts = shard_count(self.mesh, "batch", TRAINING)
        shards = self.mesh.shape[SEQUENCE]
        if self.batch_size % (self.micro * parts):
            raise ConfigError(
                f"batch_size ({self.batch_size}) cannot be divided by accumulate ({self.micro}) "
                f"times the {parts} parts of the mesh's data and fsdp axes; choose a multiple of "
                f"{self.micro * parts}"
            )
        if shards > 1 and self.sequence_length % (2 * shards):
            raise ConfigError(
                f"sequence_length ({self.sequence_length}) cannot be divided by {2 * shards}, "
                f"twice the mesh's sequence axis ({shards}); choose a multiple of {2 * shards}"
            )

    @cached_property
    def sharding(self) -> NamedSharding:
        """Return the sharding of each array of a batch."""
        rows, positions = partition_spec(("batch", "position"), TRAINING)
        return NamedSharding(self.mesh, PartitionSpec(None, rows, positions))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape of each array of a batch."""
        return self.micro, self.batch_size // self.micro, self.sequence_length

    @cached_property
    def _local_rows(self) -> list[int]:
        # Of each microbatch, the rows that this process's devices need.
        _, rows, _ = self.shape
        indices: Any = self.sharding.addressable_devices_indices_map(self.shape).values()
        return sorted({r for _, cut, _ in indices for r in range(*cut.indices(rows))})

    @property
    def rows(self) -> list[int]:
        """Return the rows of the global batch that this process reads, in the order of `place`."""
        _, rows, _ = self.shape
        return [micro * rows + row for micro in range(self.micro) for row in self._local_rows]

    def place(self, local: Mapping[str, np.ndarray]) -> Batch:
        """Build the global batch from this process's rows, each array [len(rows), seq]."""
        shards = self.mesh.shape[SEQUENCE]
        order = zigzag(self.sequence_length, shards) if shards > 1 else slice(None)
        index_of = {row: index for index, row in enumerate(self._local_rows)}

        def spread(array: np.ndarray) -> jax.Array:
            cut = array.reshape(self.micro, len(self._local_rows), -1)[:, :, order]

            def shard(index: Any) -> np.ndarray:
                micro, rows, positions = index
                local_rows = [index_of[row] for row in range(*rows.indices(self.shape[1]))]
                return cut[micro][:, local_rows, positions]

            return jax.make_array_from_callback(self.shape, self.sharding, shard)

        return Batch(**{name: spread(local[name]) for name in Batch.__dataclass_fields__})


def causal_pairs(segments: Int[np.ndarray, "rows seq"]) -> int:
    """Count the pairs of a query and a key that causality and segments allow, in rows in order.

    A segment of n tokens has n (n + 1) / 2 pairs. Segment -1 is padding, without pairs.
    """
    rows, length = segments.shape
    starts = np.ones((rows, length), bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = np.flatnonzero(starts)
    lengths = np.diff(first, append=rows * length)[segments.ravel()[first] >= 0].astype(np.int64)
    return int((lengths * (lengths + 1) // 2).sum())
