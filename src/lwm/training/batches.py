"""Batches from the host onto the mesh.

Each process reads the rows that its devices need; positions are laid out in the balanced order of
the sequence axis. Knows arrays and a mesh; knows no files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lwm.attention.order import zigzag
from lwm.core.errors import ConfigError
from lwm.core.mesh import SEQUENCE
from lwm.core.sharding import TRAINING, partition_spec, shard_count
from lwm.training.step import Batch


@dataclass(frozen=True)
class Layout:
    """How a global batch is cut: [micro, rows, seq] over the mesh.

    Args:
        batch_size: rows of a step, over all microbatches and processes.
        micro: microbatches whose gradients make one step.
    """

    mesh: Mesh
    batch_size: int
    micro: int
    sequence_length: int

    def __post_init__(self) -> None:
        parts = shard_count(self.mesh, "batch", TRAINING)
        shards = self.mesh.shape[SEQUENCE]
        if self.micro < 1 or self.batch_size < 1:
            raise ConfigError(
                f"batch_size is {self.batch_size} and accumulate {self.micro}; both must be at "
                "least 1"
            )
        if self.batch_size % (self.micro * parts):
            raise ConfigError(
                f"batch_size ({self.batch_size}) cannot be divided by accumulate ({self.micro}) "
                f"times the {parts} parts that the mesh's data and fsdp axes cut it into; make it "
                f"a multiple of {self.micro * parts}"
            )
        if shards > 1 and self.sequence_length % (2 * shards):
            raise ConfigError(
                f"sequence_length ({self.sequence_length}) cannot be divided by {2 * shards}, "
                f"twice the mesh's sequence axis ({shards}); choose a multiple of {2 * shards}"
            )

    @cached_property
    def sharding(self) -> NamedSharding:
        rows, positions = partition_spec(("batch", "position"), TRAINING)
        return NamedSharding(self.mesh, PartitionSpec(None, rows, positions))

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.micro, self.batch_size // self.micro, self.sequence_length

    @cached_property
    def _own(self) -> list[int]:
        """Rows of each microbatch that this process's devices hold."""
        _, rows, _ = self.shape
        indices: Any = self.sharding.addressable_devices_indices_map(self.shape).values()
        return sorted({r for _, cut, _ in indices for r in range(*cut.indices(rows))})

    @property
    def rows(self) -> list[int]:
        """Rows of the global batch that this process reads, in the order `place` takes them."""
        _, rows, _ = self.shape
        return [micro * rows + row for micro in range(self.micro) for row in self._own]

    def place(self, local: Mapping[str, np.ndarray]) -> Batch:
        """The global batch from this process's rows, each [len(rows), seq]."""
        shards = self.mesh.shape[SEQUENCE]
        order = zigzag(self.sequence_length, shards) if shards > 1 else slice(None)
        where = {row: i for i, row in enumerate(self._own)}

        def spread(array: np.ndarray) -> jax.Array:
            cut = array.reshape(self.micro, len(self._own), -1)[:, :, order]

            def part(index: Any) -> np.ndarray:
                micro, rows, positions = index
                held = [where[row] for row in range(*rows.indices(self.shape[1]))]
                return cut[micro][:, held, positions]

            return jax.make_array_from_callback(self.shape, self.sharding, part)

        return Batch(**{name: spread(local[name]) for name in Batch.__dataclass_fields__})
