"""Save a run's checkpoints in the background with Orbax, and restore the latest readable one.

A checkpoint holds the training state, the data position of every process, and facts on the model.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import absl.logging
import grain
import orbax.checkpoint as ocp
from annotated_types import Ge
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lwm.core.config import Checked
from lwm.core.distributed import any_process, first_process
from lwm.core.errors import CheckpointError
from lwm.core.progress import say

DIRECTORY = "checkpoints"

# Reading a checkpoint that a crash left incomplete raises one of these. Other errors, such as too
# little memory or a missing permission, do not mean that the checkpoint is torn.
_TORN = (FileNotFoundError, LookupError, TypeError, ValueError, AttributeError, RecursionError)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Checked, section="checkpoint"):
    """Set when checkpoints are written and which are not deleted."""

    every: Annotated[int, Ge(1)] = 100
    """Steps between checkpoints; the last step always gets one."""
    keep: Annotated[int, Ge(1)] = 2
    """Number of latest checkpoints that stay."""
    milestones: Annotated[int, Ge(0)] = 0
    """Write a checkpoint at every multiple of this, and never delete it; 0 for none."""
    best: Annotated[int, Ge(0)] = 1
    """Number of checkpoints with the lowest evaluation loss that stay as well."""


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class Checkpoints:
    """Manage the checkpoints of one run, in `checkpoints/STEP` of its directory."""

    def __init__(self, run: Path, config: CheckpointConfig) -> None:
        self.config = config
        self._directory = (run / DIRECTORY).absolute()
        # This class reports errors.
        absl.logging.set_verbosity(absl.logging.FATAL)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        policies: list[Any] = [preservation_policy.LatestN(config.keep)]
        if config.milestones:
            policies.append(preservation_policy.EveryNSteps(config.milestones))
        if config.best:
            lowest = preservation_policy.BestN(
                get_metric_fn=lambda metrics: metrics["loss"],
                reverse=True,
                n=config.best,
                keep_checkpoints_without_metrics=False,
            )
            policies.append(lowest)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )
        try:
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        except _TORN as error:
            raise CheckpointError(
                f"the checkpoints in {self._directory} are broken ({_reason(error)}); remove the "
                "latest, start from the beginning with --fresh, or use another --out"
            ) from error

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is written at this step in any case."""
        milestones = self.config.milestones
        return step % self.config.every == 0 or (milestones > 0 and step % milestones == 0)

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: Any,
        data: grain.DatasetIterator,
        facts: dict[str, Any],
        evaluation: float | None,
    ) -> None:
        """Start to write a checkpoint, or raise CheckpointError if this or the last one fails.

        The state may change as soon as this returns. `evaluation` is the loss on the held-out
        split, if it was measured at this step.
        """
        if step in self._manager.all_steps():
            return
        measured = evaluation is not None and math.isfinite(evaluation)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),  # type: ignore[call-arg]
            data=grain.checkpoint.CheckpointSave(data),  # type: ignore[call-arg]
            facts=ocp.args.JsonSave(facts),  # type: ignore[call-arg]
        )
        metrics = {"loss": evaluation} if measured else None
        with self._reporting(step):
            self._manager.save(step, args=items, metrics=metrics)

    def wait(self) -> None:
        """Wait until the last checkpoint is complete; raise CheckpointError if it fails."""
        with self._reporting(None):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    @contextmanager
    def _reporting(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._manager.reload()  # otherwise it omits checkpoints that it was about to delete
            reason = " ".join(str(error).split())[:300]
            complete = [name for name in self.steps() if name != step]
            last = self._directory / str(complete[-1]) if complete else "missing"
            raise CheckpointError(
                f"a checkpoint could not be written to {self._directory} ({reason}); the last "
                f"good one is {last}; make room and start the same command again"
            ) from error

    def restore(
        self,
        template: Any,
        data: grain.DatasetIterator,
        require_same: Callable[[dict[str, Any]], None],
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Return step, state and facts of the latest readable checkpoint, or None without any.

        Moves `data` to its position. Renames checkpoints that a crash left incomplete, with a
        warning, and raises CheckpointError if no other is left.

        Args:
            template: shapes, types and shardings of the state.
            require_same: raises ConfigError if the saved facts belong to another run.
        """
        steps = self.steps()
        for step in reversed(steps):
            restored, reason = None, "another process cannot read it"
            try:
                restored = self._read(step, template, require_same)
                data.set_state(restored[1])
            except Exception as error:
                if not (isinstance(error, _TORN) or type(error) is Exception):  # Orbax raises it
                    raise
                restored = None
                reason = _reason(error)
            # All processes resume from the same checkpoint, so each must be able to read it.
            if not any_process(restored is None) and restored is not None:
                state, _, facts = restored
                return step, state, facts
            say(f"warning: the checkpoint of step {step} cannot be read ({reason})")
            self._set_aside(step)
        if steps:
            raise CheckpointError(
                f"none of the checkpoints in {self._directory} can be read (each is renamed to "
                "torn-STEP); start from the beginning with --fresh, or use another --out"
            )
        return None

    def _read(
        self, step: int, template: Any, require_same: Callable[[dict[str, Any]], None]
    ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        items = ocp.args.Composite(facts=ocp.args.JsonRestore())
        facts = self._manager.restore(step, args=items)["facts"]
        require_same(facts)
        files = sorted((self._directory / str(step) / "data").glob("process_*.json"))
        positions = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        if not positions:
            raise FileNotFoundError(f"the data's position is missing from step {step}")
        position = positions[0]
        if "rows" in position:  # merged, since the number of processes may have changed
            position["rows"] = {row: at for part in positions for row, at in part["rows"].items()}
        state = ocp.args.StandardRestore(template)  # type: ignore[call-arg]
        items = ocp.args.Composite(state=state)
        return self._manager.restore(step, args=items)["state"], position, facts

    def _set_aside(self, step: int) -> None:
        if first_process():
            aside = self._directory / f"torn-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            (self._directory / str(step)).rename(aside)
        any_process(False)  # the others read the directory only after it is renamed
        self._manager.reload()

    def close(self) -> None:
        """Release the checkpoint manager; raise CheckpointError if the last checkpoint fails."""
        with self._reporting(None):
            self._manager.close()
