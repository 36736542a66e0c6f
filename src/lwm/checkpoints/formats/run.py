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
_MARK = "_CHECKPOINT_METADATA"


def is_run(directory: Path) -> bool:
    """Return whether this is a run's directory or one of its checkpoints."""
    return (directory / RUN_FILE).is_file() or (directory / _MARK).is_file()


def open_run(directory: Path, open_base: Callable[[str], Checkpoint]) -> Checkpoint:
    """Open a run's checkpoint, or the latest checkpoint of a run.

    Args:
        open_base: opens the MODEL that adapters were trained on.
    """
    step = latest(directory)
    facts = read_json(step / "facts" / "metadata")
    if not isinstance(facts.get("model"), dict):
        raise CheckpointError(f"{step} does not describe the model; use another checkpoint")
    tensors, stored_dtype = StackedTensors(step), "float32"
    if facts.get("lora"):
        lora = from_dict(LoraConfig, facts["lora"], f"{step}/facts")
        base = open_base(str(facts.get("init")))
        tensors, stored_dtype = _AdaptedTensors(base, tensors, lora), base.stored_dtype
    run = step.parent.parent
    return Checkpoint(
        source=str(directory),
        format="run",
        stored_dtype=stored_dtype,
        config=from_dict(LlamaConfig, facts["model"], f"{step}/facts"),
        table=LWM_NAMES,
        tensors=tensors,
        vocabulary=run / TOKENIZER if (run / TOKENIZER).is_dir() else None,
        vqgan=vqgan_in(run),
        path=step,
    )


def latest(directory: Path) -> Path:
    """Return a run's last complete checkpoint, or the directory if it is a checkpoint itself."""
    if (directory / _MARK).is_file():
        return directory
    checkpoints = complete_checkpoints(directory)
    if not checkpoints:
        raise CheckpointError(f"the run {directory} has no checkpoint yet; train it first")
    return checkpoints[-1]


def complete_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints that were written completely, by step."""
    steps = (run / "checkpoints").glob("*")
    complete = [path for path in steps if path.name.isdigit() and (path / _MARK).is_file()]
    return sorted(complete, key=lambda path: int(path.name))


class StackedTensors:
    """Provide the weights of a checkpoint, whose layers are stacked, one layer at a time."""

    def __init__(self, step: Path) -> None:
        self._base = (step / "state").absolute()
        tree = read_json(self._base / "_METADATA").get("tree_metadata")
        self.stacked: dict[str, tuple[int, ...]] = {}
        for entry in tree.values() if isinstance(tree, dict) else ():
            try:
                root, *path = (str(key["key"]) for key in entry["key_metadata"])
                shape = tuple(int(n) for n in entry["value_metadata"]["write_shape"])
            except (KeyError, TypeError, ValueError):
                continue  # an empty node of the optimizer's state
            if root == "weights":
                self.stacked[".".join(path)] = shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        result = {}
        for name, shape in self.stacked.items():
            field = name.removeprefix("layers.")
            if field == name:
                result[name] = shape
            else:
                result |= {f"layers.{i}.{field}": shape[1:] for i in range(shape[0])}
        return result

    def read(self, name: str) -> np.ndarray:
        if not name.startswith("layers."):
            return self.read_stacked(name)
        _, layer, field = name.split(".", 2)
        return self.read_stacked(f"layers.{field}", int(layer))

    def read_stacked(self, name: str, layer: int | None = None) -> np.ndarray:
        """Read one array as it is stored, or one layer of it."""
        import tensorstore

        store = {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{self._base}/"},
            "path": f"weights.{name}/",
        }
        try:
            array = tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result()
            return np.asarray((array if layer is None else array[layer]).read().result())
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
            step = self._base.parent
            others = [path for path in complete_checkpoints(step.parent.parent) if path != step]
            raise CheckpointError(
                f"{step} is broken at {name!r} ({reason}); use another checkpoint"
                + (f", such as {others[-1]}" if others else "")
            ) from error


class _AdaptedTensors:
    def __init__(self, base: Checkpoint, adapters: StackedTensors, lora: LoraConfig) -> None:
        self._base, self._adapters, self._lora = base, adapters, lora
        self._read = base.reader()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in named_specs(self._base.config).items()}

    def read(self, name: str) -> np.ndarray:
        weights = self._read(name)
        layer, _, target = name.removeprefix("layers.").partition(".")
        if f"{target}.down" not in self._adapters.stacked:
            return weights
        down, up = (
            self._adapters.read_stacked(f"{target}.{part}", int(layer)) for part in ("down", "up")
        )
        return np.asarray(weights, np.float32) + (down @ up) * np.float32(self._lora.scale)
