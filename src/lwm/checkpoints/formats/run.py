"""Open a training run, or one of its checkpoints, as a model.

Tensors are read one layer at a time from what Orbax wrote. Adapters are added to the model they
were trained on as its tensors are read.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from lwm.checkpoints.checkpoint import Checkpoint, vqgan_in
from lwm.checkpoints.names import LWM_NAMES, named_specs
from lwm.core.config import from_dict, read_json
from lwm.core.errors import CheckpointError
from lwm.models.llama import LlamaConfig
from lwm.models.lora import LoraConfig

RUN_FILE, TOKENIZER = "run.json", "tokenizer"
BASE = "base"
"""The copy of the model that a run's adapters are added to, if that is a checkpoint of another
run, which that run would delete later."""
_CHECKPOINTS = "checkpoints"
_MARK = "_CHECKPOINT_METADATA"


def is_run(directory: Path) -> bool:
    """Return whether this is a run's directory or one of its checkpoints."""
    return (directory / RUN_FILE).is_file() or (directory / _MARK).is_file()


def open_run(directory: Path, open_base: Callable[[str], Checkpoint]) -> Checkpoint:
    """Open a run's checkpoint, or the latest checkpoint of a run.

    Args:
        open_base: opens the MODEL that adapters were trained on.

    Raises:
        CheckpointError: there is no checkpoint, or it is broken.
    """
    step = directory if (directory / _MARK).is_file() else latest(directory)
    facts = read_json(step / "facts" / "metadata")
    model = facts.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(
            f"{step} does not describe the model it contains; use another checkpoint"
        )
    config = from_dict(LlamaConfig, model, f"{step}/facts")
    run = step.parent.parent
    arrays = StackedTensors(step, "weights")
    if facts.get("lora"):
        lora = from_dict(LoraConfig, facts["lora"], f"{step}/facts")
        base = open_base(str(facts.get("init")))
        tensors, stored_dtype = AdaptedTensors(base, arrays, lora), base.stored_dtype
    else:
        tensors, stored_dtype = StackedModel(arrays), "float32"
    return Checkpoint(
        source=str(directory),
        format="run",
        stored_dtype=stored_dtype,
        config=config,
        table=LWM_NAMES,
        tensors=tensors,
        vocabulary=run / TOKENIZER if (run / TOKENIZER).is_dir() else None,
        vqgan=vqgan_in(run),
        path=step,
    )


def latest(run: Path) -> Path:
    """Return the last complete checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    checkpoints = complete_checkpoints(run)
    if not checkpoints:
        raise CheckpointError(f"the run {run} has no checkpoint yet; train a few steps first")
    return checkpoints[-1]


def complete_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints that were written completely, by step."""
    steps = (run / _CHECKPOINTS).glob("*")
    complete = [path for path in steps if path.name.isdigit() and (path / _MARK).is_file()]
    return sorted(complete, key=lambda path: int(path.name))


class StackedTensors:
    """Provide the arrays of a checkpoint's state by their path, layers stacked.

    Attributes:
        shapes: the shape of each array below `root`.
    """

    def __init__(self, step: Path, root: str) -> None:
        self._base, self._root = (step / "state").absolute(), root
        tree = read_json(self._base / "_METADATA").get("tree_metadata")
        self.shapes: dict[str, tuple[int, ...]] = {}
        for entry in tree.values() if isinstance(tree, dict) else ():
            try:
                path = [str(key["key"]) for key in entry["key_metadata"]]
                shape = tuple(int(n) for n in entry["value_metadata"]["write_shape"])
            except (KeyError, TypeError, ValueError):
                continue  # an empty node of the optimizer's state
            if path[0] == root:
                self.shapes[".".join(path[1:])] = shape

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        """Read one array, or one layer of it."""
        import tensorstore

        spec = {
            "driver": "zarr",
            "kvstore": {
                "driver": "ocdbt",
                "base": {"driver": "file", "path": f"{self._base}/"},
                "path": f"{self._root}.{name}/",
            },
        }
        try:
            array = tensorstore.open(spec, read=True).result()
            return np.asarray((array if layer is None else array[layer]).read().result())
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
            step = self._base.parent
            others = [path for path in complete_checkpoints(step.parent.parent) if path != step]
            raise CheckpointError(
                f"{step} is broken at {name!r} ({reason}); use another checkpoint"
                + (f", such as {others[-1]}" if others else "")
            ) from error


class StackedModel:
    """Provide the tensors of a checkpoint by our names, one layer at a time."""

    def __init__(self, arrays: StackedTensors) -> None:
        self._arrays = arrays

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return shapes by our names."""
        result = {}
        for name, shape in self._arrays.shapes.items():
            field = name.removeprefix("layers.")
            if field == name:
                result[name] = shape
            else:
                result |= {f"layers.{i}.{field}": shape[1:] for i in range(shape[0])}
        return result

    def read(self, name: str) -> np.ndarray:
        """Read one tensor by our name."""
        if name.startswith("layers."):
            _, layer, field = name.split(".")
            return self._arrays.read(f"layers.{field}", int(layer))
        return self._arrays.read(name)


class AdaptedTensors:
    """Provide the tensors of a model with adapters added to its kernels."""

    def __init__(self, base: Checkpoint, arrays: StackedTensors, lora: LoraConfig) -> None:
        self._base, self._arrays, self._lora = base, arrays, lora
        self._read = base.reader()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return shapes by our names."""
        return {name: spec.shape for name, spec in named_specs(self._base.config).items()}

    def read(self, name: str) -> np.ndarray:
        """Read one tensor by our name."""
        kernel = self._read(name)
        prefix, _, target = name.rpartition(".")
        if not prefix or f"{target}.down" not in self._arrays.shapes:
            return kernel
        layer = int(prefix.removeprefix("layers."))
        down = self._arrays.read(f"{target}.down", layer)
        up = self._arrays.read(f"{target}.up", layer)
        return np.asarray(kernel, np.float32) + (down @ up) * np.float32(self._lora.scale)
