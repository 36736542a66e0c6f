"""Lay devices out as a mesh of four axes, and parse the grammar for their sizes.

`data, fsdp, tensor, sequence` are the original's `dp, fsdp, tp, sp`. What is sharded over them is
defined in `sharding`.

Source of the grammar: the original's `mesh_dim` flag (LargeWorldModel/LWM).
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from lwm.core.errors import ConfigError
from lwm.core.hardware import traits_of

DATA, FSDP, TENSOR, SEQUENCE = "data", "fsdp", "tensor", "sequence"
AXES = (DATA, FSDP, TENSOR, SEQUENCE)
_SHORT = {"dp": DATA, "fsdp": FSDP, "tp": TENSOR, "sp": SEQUENCE}


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Hold the sizes of the four axes in device order, slowest first.

    At most one is -1 and takes the devices that are left.
    """

    axes: tuple[str, ...] = AXES
    sizes: tuple[int, ...] = (1, 1, 1, 1)
    split_physical_axes: bool = False  # let a logical axis take part of a TPU torus dimension

    def __post_init__(self) -> None:
        if sorted(self.axes) != sorted(AXES) or len(self.sizes) != len(AXES):
            raise ConfigError(
                f"mesh axes are {self.axes}; each of {AXES} must appear exactly once"
            )
        if any(size < 1 and size != -1 for size in self.sizes) or self.sizes.count(-1) > 1:
            raise ConfigError(
                f"mesh sizes are {self.sizes}; each must be a positive count, and at most one may "
                "be -1"
            )

    def resolve(self, device_count: int) -> "MeshShape":
        """Replace -1 by the number of devices that are left; raise ConfigError if none fits."""
        fixed = math.prod(size for size in self.sizes if size != -1)
        if fixed > device_count:
            raise ConfigError(
                f"the mesh {self} needs {fixed} devices but {device_count} "
                f"{'is' if device_count == 1 else 'are'} present; use a smaller one, such as "
                "--mesh 1,1,1,1, or simulate devices on a CPU with the environment variable "
                f"JAX_NUM_CPU_DEVICES={fixed}"
            )
        if -1 in self.sizes and device_count % fixed:
            raise ConfigError(
                f"the mesh {self} has one open size, but {fixed} does not divide the "
                f"{device_count} devices present; choose sizes whose product does"
            )
        sizes = tuple(device_count // fixed if size == -1 else size for size in self.sizes)
        return MeshShape(axes=self.axes, sizes=sizes, split_physical_axes=self.split_physical_axes)

    def __str__(self) -> str:
        by_name = dict(zip(self.axes, self.sizes, strict=True))
        return ("!" if self.split_physical_axes else "") + ",".join(
            str(by_name[axis]) for axis in AXES
        )


def parse_mesh(text: str) -> MeshShape:
    """Parse `1,-1,4,1` (dp,fsdp,tp,sp) or `dp:1,fsdp:-1,tp:4,sp:1`, with an optional leading `!`.

    Axes may have their full names or the original's short ones. Named axes may come in any order,
    which is then the order of the devices. `!` lets a logical axis split a physical one. Any other
    form raises ConfigError.
    """
    body = text.strip()
    split = body.startswith("!")
    parts = [part.strip() for part in body.removeprefix("!").split(",")]
    named = [part.partition(":") for part in parts]
    try:
        sizes = tuple(int(size if colon else name) for name, colon, size in named)
    except ValueError:
        sizes = ()
    colons = {bool(colon) for _, colon, _ in named}
    if len(sizes) != len(AXES) or len(colons) != 1:
        raise ConfigError(
            f"the mesh {text!r} cannot be parsed; write four counts for data, fsdp, tensor and "
            "sequence such as '1,-1,4,1', or name them as in 'dp:1,fsdp:-1,tp:4,sp:1'"
        )
    if colons == {False}:
        return MeshShape(sizes=sizes, split_physical_axes=split)
    axes = tuple(_SHORT.get(name.strip(), name.strip()) for name, _, _ in named)
    return MeshShape(axes=axes, sizes=sizes, split_physical_axes=split)


def make_mesh(shape: MeshShape | str) -> Mesh:
    """Lay the first devices out as a mesh; raise ConfigError if there are not enough."""
    shape = parse_mesh(shape) if isinstance(shape, str) else shape
    devices = jax.devices()
    shape = shape.resolve(len(devices))
    grid = mesh_utils.create_device_mesh(
        shape.sizes,
        devices[: math.prod(shape.sizes)],
        allow_split_physical_axes=shape.split_physical_axes,
    )
    return Mesh(grid, shape.axes, axis_types=(AxisType.Auto,) * len(AXES))


def pace(launched: Any) -> None:
    """Wait for a program that runs on several CPU devices, such as simulated ones.

    XLA's CPU client allows 32 programs per device in flight, and blocks further launches on the
    same threads that the programs need. Collectives then wait for each other until XLA aborts the
    process. Call this after each of a series of launches; it costs little, because simulated
    devices share the machine's cores.
    """
    devices = jax.tree.leaves(launched)[0].sharding.device_set
    if len(devices) > 1 and traits_of(next(iter(devices)).platform).bounded_launches:
        jax.block_until_ready(launched)


def require_all_devices(mesh: Mesh | None) -> None:
    """Raise ConfigError if several processes work together on a mesh that leaves out devices."""
    if jax.process_count() > 1 and (mesh is None or mesh.size < jax.device_count()):
        count = jax.device_count()
        problem = "there is no mesh" if mesh is None else f"the mesh takes {mesh.size} devices"
        raise ConfigError(
            f"{problem}, but {jax.process_count()} processes with {count} devices work together "
            f"and each must own a part; choose a --mesh that takes all, such as 1,1,1,{count}"
        )
