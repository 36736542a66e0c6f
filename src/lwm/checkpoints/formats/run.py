"""A training run, or one of its checkpoints, opened as a model.

Reads one layer of one tensor at a time, straight from what Orbax wrote. Adapters are added to the
model they were trained on as its tensors are read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lwm.checkpoints.checkpoint import Checkpoint, vqgan_in
from lwm.checkpoints.names import NATIVE, named_specs
from lwm.core.config import from_dict, read_json
from lwm.core.errors import CheckpointError
from lwm.models.llama import LlamaConfig
from lwm.models.lora import LoraConfig

RUN_FILE, TOKENIZER = "run.json", "tokenizer"
BASE = "base"
"""Where a run of adapters keeps the model they are added to, if that is a checkpoint of a run,
which its own run would delete sooner or later."""
_CHECKPOINTS = "checkpoints"
_MARK = "_CHECKPOINT_METADATA"

Open = Callable[[str], Checkpoint]


def is_run(directory: Path) -> bool:
    """Whether this is a run's directory or one of its checkpoints."""
    return (directory / RUN_FILE).is_file() or (directory / _MARK).is_file()


def open_run(directory: Path, source: str, open_base: Open) -> Checkpoint:
    """The checkpoint named, or the latest of the run named.

    Args:
        open_base: opens the MODEL that adapters were trained on.

    Raises:
        CheckpointError: there is none, or it is broken.
    """
    step = directory if (directory / _MARK).is_file() else latest(directory)
    facts = read_json(step / "facts" / "metadata")
    model = facts.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{step} does not say which model it holds; take another checkpoint")
    config = from_dict(LlamaConfig, model, f"{step}/facts")
    tokenizer = step.parent.parent / TOKENIZER
    vocabulary = tokenizer if tokenizer.is_dir() else None
    if facts.get("lora"):
        lora = from_dict(LoraConfig, facts["lora"], f"{step}/facts")
        base = open_base(str(facts.get("init")))
        tensors: Any = AdaptedTensors(base, StackedTensors(step, "weights"), lora)
        stored = base.stored
    else:
        tensors, stored = StackedModel(StackedTensors(step, "weights"), config), "float32"
    return Checkpoint(
        source=source, format="run", stored=stored, config=config, table=NATIVE,
        tensors=tensors, vocabulary=vocabulary, path=step, vqgan=vqgan_in(step.parent.parent),
    )  # fmt: skip


def latest(run: Path) -> Path:
    """The last whole checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    if not (found := whole_checkpoints(run)):
        raise CheckpointError(f"the run {run} has no checkpoint yet; train a few steps first")
    return found[-1]


def whole_checkpoints(run: Path) -> list[Path]:
    """Checkpoints that were written to their end, by step."""
    found = (run / _CHECKPOINTS).glob("*")
    whole = [path for path in found if path.name.isdigit() and (path / _MARK).is_file()]
    return sorted(whole, key=lambda path: int(path.name))


class StackedTensors:
    """Arrays of a checkpoint's state by their path, layers stacked."""

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
        """One array, or one layer of it."""
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
            others = [str(path) for path in whole_checkpoints(step.parent.parent) if path != step]
            raise CheckpointError(
                f"{step} is broken at {name!r} ({reason}); take another checkpoint"
                + (f", such as {others[-1]}" if others else "")
            ) from error


def _split(name: str) -> tuple[str, int | None]:
    """`layers.3.query` -> (`layers.query`, 3)."""
    parts = name.split(".")
    return (f"layers.{parts[2]}", int(parts[1])) if parts[0] == "layers" else (name, None)


class StackedModel:
    """Tensors of a whole model under our names, layers one by one."""

    def __init__(self, arrays: StackedTensors, config: LlamaConfig) -> None:
        self._arrays, self._config = arrays, config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found = {}
        for name, shape in self._arrays.shapes.items():
            if not name.startswith("layers."):
                found[name] = shape
                continue
            field = name.removeprefix("layers.")
            found |= {f"layers.{i}.{field}": shape[1:] for i in range(shape[0])}
        return found

    def read(self, name: str) -> np.ndarray:
        return self._arrays.read(*_split(name))


class AdaptedTensors:
    """Tensors of a model with adapters added."""

    def __init__(self, base: Checkpoint, arrays: StackedTensors, lora: LoraConfig) -> None:
        self._base, self._arrays, self._lora = base, arrays, lora
        self._read = base.reader()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in named_specs(self._base.config).items()}

    def read(self, name: str) -> np.ndarray:
        kernel = self._read(name)
        stacked, layer = _split(name)
        target = stacked.removeprefix("layers.")
        if layer is None or f"{target}.down" not in self._arrays.shapes:
            return kernel
        down = self._arrays.read(f"{target}.down", layer)
        up = self._arrays.read(f"{target}.up", layer)
        return np.asarray(kernel, np.float32) + (down @ up) * np.float32(self._lora.scale)
