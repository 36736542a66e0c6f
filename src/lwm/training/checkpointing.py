"""Checkpoints of a run: saved in the background, kept by rule, restored past torn ones.

Each holds the state of learning, the state of every process's data, and the facts a reader needs
to open it as a model (`checkpoints.run`). Knows Orbax; knows no step function.
"""

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lwm.core.errors import CheckpointError, ConfigError, LwmError
from lwm.core.progress import say

DIRECTORY = "checkpoints"
STATE, DATA, FACTS = "state", "data", "facts"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which stay."""

    every: int = 100
    """Steps between checkpoints; the last step always gets one."""
    keep: int = 2
    """Latest checkpoints that stay."""
    milestones: int = 0
    """Every checkpoint whose step is a multiple of this stays too; 0 for none."""
    best: int = 1
    """Checkpoints of lowest evaluation loss that stay too."""

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("keep", 1), ("milestones", 0), ("best", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"checkpoint.{name} is {getattr(self, name)}; it must be at least {least}"
                )


class Checkpoints:
    """The checkpoints of one run directory, in `checkpoints/STEP`."""

    def __init__(self, run: Path, config: CheckpointConfig) -> None:
        self._directory = (run / DIRECTORY).absolute()
        logging.set_verbosity(logging.FATAL)  # what goes wrong is told here in our own words
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
                metrics=None if evaluation is None else {"loss": evaluation},
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
        # The other writers fail for the same reason, each with a trace of its own.
        threading.excepthook = lambda _: None
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
            try:
                wanted = ocp.args.Composite(facts=ocp.args.JsonRestore())
                facts = self._manager.restore(step, args=wanted)[FACTS]
                require_same(facts)
                wanted = ocp.args.Composite(
                    state=ocp.args.StandardRestore(template),  # type: ignore[call-arg]
                    data=grain.checkpoint.CheckpointRestore(data),  # type: ignore[call-arg]
                )
                return step, self._manager.restore(step, args=wanted)[STATE], facts
            except LwmError:  # the user's settings differ; nothing is wrong with the checkpoint
                raise
            except Exception as error:  # whatever is broken inside, the one before may be whole
                reason = " ".join(str(error).split())[:200]
                say(f"warning: the checkpoint of step {step} cannot be read ({reason})")
                self._set_aside(step)
        if found:
            raise CheckpointError(
                f"none of the checkpoints in {self._directory} can be read (each is kept as "
                "torn-STEP); start anew with --fresh or in another --out"
            )
        return None

    def _set_aside(self, step: int) -> None:
        """Renames a torn checkpoint, so that its step can be saved again and nothing is lost."""
        if jax.process_index() == 0:
            aside = self._directory / f"torn-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            (self._directory / str(step)).rename(aside)
        self._manager.reload()

    def close(self) -> None:
        self._manager.close()
