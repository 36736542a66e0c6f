"""Checkpoints of a run: saved in the background, kept by rule, restored past torn ones.

Each holds the state of learning, the state of every process's data, and the facts a reader needs
to open it as a model (`checkpoints.run`). Knows Orbax; knows no step function.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import absl.logging
import grain
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lwm.core.distributed import any_process, first_process
from lwm.core.errors import CheckpointError, ConfigError
from lwm.core.progress import say

DIRECTORY = "checkpoints"

STATE, DATA, FACTS = "state", "data", "facts"

_TORN = (FileNotFoundError, KeyError, TypeError, ValueError)
"""What reading a checkpoint raises that a crash left incomplete: files missing, cut short, or no
longer what they were. Too little memory, or a file that may not be read, is no such fault."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which stay."""

    every: int = 100
    """Steps between checkpoints; the last step always gets one."""
    keep: int = 2
    """Latest checkpoints that stay."""
    milestones: int = 0
    """A checkpoint at every multiple of this is written and stays; 0 for none."""
    best: int = 1
    """Checkpoints of lowest evaluation loss that stay too."""

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("keep", 1), ("milestones", 0), ("best", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"checkpoint.{name} is {getattr(self, name)}; it must be at least {least}"
                )

    def due(self, step: int) -> bool:
        """Whether a checkpoint is wanted at a step."""
        return step % self.every == 0 or (self.milestones > 0 and step % self.milestones == 0)


class Checkpoints:
    """The checkpoints of one run directory, in `checkpoints/STEP`."""

    def __init__(self, run: Path, config: CheckpointConfig) -> None:
        self._directory = (run / DIRECTORY).absolute()
        self.keep_best = config.best > 0
        # What goes wrong is told here in our own words.
        absl.logging.set_verbosity(absl.logging.FATAL)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        policies: list[Any] = [preservation_policy.LatestN(config.keep)]
        if config.milestones:
            policies.append(preservation_policy.EveryNSteps(config.milestones))
        if config.best:
            policies.append(
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: metrics["loss"],
                    reverse=True,  # the lowest is the best
                    n=config.best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
            ),
        )

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: Any,
        data: grain.DatasetIterator,
        facts: dict[str, Any],
        evaluation: float | None,
    ) -> None:
        """Starts to write a checkpoint; the state may change as soon as this returns.

        Args:
            evaluation: loss on the held-out split, where it was measured at this step.

        Raises:
            CheckpointError: this or the one before could not be written.
        """
        if step in self._manager.all_steps():
            return
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),  # type: ignore[call-arg]
                    data=grain.checkpoint.CheckpointSave(data),  # type: ignore[call-arg]
                    facts=ocp.args.JsonSave(facts),  # type: ignore[call-arg]
                ),
                metrics=None
                if evaluation is None or not math.isfinite(evaluation)
                else {"loss": evaluation},
            )
        except Exception as error:
            raise self._unsaved(step, error) from error

    def wait(self) -> None:
        """Waits until the last checkpoint is complete.

        Raises:
            CheckpointError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._unsaved(None, error) from error

    def _unsaved(self, step: int | None, error: Exception) -> CheckpointError:
        self._manager.reload()  # it forgets those it would have deleted, had this been written
        reason = " ".join(str(error).split())[:300]
        kept = [name for name in self.steps() if name != step]
        last = (
            f"the last good one is {self._directory / str(kept[-1])}" if kept else "none is kept"
        )
        return CheckpointError(
            f"a checkpoint could not be written to {self._directory} ({reason}); {last}; make "
            "room and start the same command again"
        )

    def restore(
        self,
        template: Any,
        data: grain.DatasetIterator,
        require_same: Callable[[dict[str, Any]], None],
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """The latest checkpoint that can be read: its step, state and facts; `data` is moved to
        its place. None where there is none.

        A checkpoint that a crash has torn is set aside with a warning.

        Args:
            template: shapes, types and shardings of the state.
            require_same: raises ConfigError at facts of another model, before anything is read.

        Raises:
            CheckpointError: there are checkpoints, and none of them can be read.
        """
        found = self.steps()
        for step in reversed(found):
            found_here, fault = None, ""
            try:
                found_here = self._read(step, template, require_same)
            except _TORN as error:
                fault = " ".join(str(error).split())[:200] or type(error).__name__
            # What one process cannot read, none may go on from.
            if not any_process(found_here is None) and found_here is not None:
                state, place, facts = found_here
                data.set_state(place)
                return step, state, facts
            reason = fault or "another process cannot read it"
            say(f"warning: the checkpoint of step {step} cannot be read ({reason})")
            self._set_aside(step)
        if found:
            raise CheckpointError(
                f"none of the checkpoints in {self._directory} can be read (each is kept as "
                "torn-STEP); start anew with --fresh or in another --out"
            )
        return None

    def _read(
        self, step: int, template: Any, require_same: Callable[[dict[str, Any]], None]
    ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """State, place in the data, and facts of a checkpoint."""
        wanted = ocp.args.Composite(facts=ocp.args.JsonRestore())
        facts = self._manager.restore(step, args=wanted)[FACTS]
        require_same(facts)
        place = self._data_state(step)
        wanted = ocp.args.Composite(
            state=ocp.args.StandardRestore(template)  # type: ignore[call-arg]
        )
        return self._manager.restore(step, args=wanted)[STATE], place, facts

    def _data_state(self, step: int) -> dict[str, Any]:
        """Where the data was, of all processes together: there may be other ones now."""
        files = sorted((self._directory / str(step) / DATA).glob("process_*.json"))
        states = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        if not states:
            raise FileNotFoundError(f"the data's position is missing from step {step}")
        merged = dict(states[0])
        if "rows" in merged:
            merged["rows"] = {row: at for state in states for row, at in state["rows"].items()}
        return merged

    def _set_aside(self, step: int) -> None:
        """Renames a torn checkpoint, so that its step can be saved again and nothing is lost."""
        if first_process():
            aside = self._directory / f"torn-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            (self._directory / str(step)).rename(aside)
        any_process(False)  # nobody looks again before it is renamed
        self._manager.reload()

    def close(self) -> None:
        self._manager.close()
