"""Check which checkpoints stay, and what they restore."""

from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
import pytest

from lwm.core.errors import CheckpointError, ConfigError
from lwm.training.checkpointing import CheckpointConfig, Checkpoints


def numbers() -> grain.DatasetIterator:
    return iter(grain.MapDataset.range(100).to_iter_dataset())


def state(step: int) -> dict[str, Any]:
    return {"weights": jnp.full((4,), float(step)), "step": jnp.array(step)}


def fill(run, config: CheckpointConfig, losses: dict[int, float | None]) -> Checkpoints:
    checkpoints, data = Checkpoints(run, config), numbers()
    for step, loss in losses.items():
        next(data)
        checkpoints.save(step, state(step), data, {"of": step}, loss)
    checkpoints.wait()
    return checkpoints


LOSSES = {2: 5.0, 4: 3.0, 6: 4.0, 8: None, 10: 4.5, 12: None}


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (CheckpointConfig(keep=2, best=0), [10, 12]),
        (CheckpointConfig(keep=1, best=1), [4, 12]),
        (CheckpointConfig(keep=1, best=2), [4, 6, 12]),
        (CheckpointConfig(keep=1, best=0, milestones=4), [4, 8, 12]),
    ],
)
def test_the_latest_the_best_and_the_milestones_stay(tmp_path, config, steps):
    checkpoints = fill(tmp_path, config, LOSSES)
    assert checkpoints.steps() == steps
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == set(steps)
    checkpoints.close()


def test_state_facts_and_data_position_are_restored(tmp_path):
    fill(tmp_path, CheckpointConfig(), {3: None, 6: None}).close()
    checkpoints, data, checked = Checkpoints(tmp_path, CheckpointConfig()), numbers(), []
    result = checkpoints.restore(state(0), data, checked.append)
    assert result is not None
    step, restored, facts = result
    assert (step, facts, checked) == (6, {"of": 6}, [{"of": 6}])
    np.testing.assert_array_equal(restored["weights"], np.full(4, 6.0))
    assert next(data) == 2
    checkpoints.close()


def test_an_empty_run_has_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    assert checkpoints.restore(state(0), numbers(), lambda facts: None) is None
    checkpoints.close()


def test_a_refusal_of_the_facts_changes_no_checkpoint(tmp_path):
    fill(tmp_path, CheckpointConfig(), {3: None}).close()
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())

    def refuse(facts: dict[str, Any]) -> None:
        raise ConfigError("another model")

    with pytest.raises(ConfigError, match="another model"):
        checkpoints.restore(state(0), numbers(), refuse)
    assert checkpoints.steps() == [3]
    checkpoints.close()


def test_a_checkpoint_that_fails_at_the_end_is_reported(tmp_path, monkeypatch):
    """Orbax raises ValueError on a disk that is full while it writes in the background."""
    checkpoints = fill(tmp_path, CheckpointConfig(), {1: 0.5})
    close = checkpoints._manager.close

    def closing() -> None:
        close()
        raise ValueError("RESOURCE_EXHAUSTED:\nno space left")

    monkeypatch.setattr(checkpoints._manager, "close", closing)
    with pytest.raises(CheckpointError, match=r"no space left.*checkpoints/1; make room"):
        checkpoints.close()
