"""Check that processes agree when to stop, rarely and at the same step."""

import signal

import jax
import numpy as np
import pytest

from lwm.training import loop
from lwm.training.loop import AGREEMENT_SECONDS, Interruption


@pytest.fixture
def processes(monkeypatch):
    """Simulate two processes that take 0.1 and 0.3 seconds per step, in the latter's place."""
    now, gathered = [0.0], []

    def gather(values: np.ndarray) -> np.ndarray:
        gathered.append(now[0])
        return np.stack([np.array([0.0, 0.1], np.float32), values])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(loop, "gather", gather)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    return now, gathered


def test_processes_agree_rarely_and_within_the_time_that_a_signal_allows(processes):
    now, gathered = processes
    with Interruption(first=10) as stop:
        for step in range(11, 200):
            now[0] += 0.3
            assert not stop.agreed(step, now=False)
        assert len(gathered) < 190 / 10
        assert np.diff(gathered).max() <= AGREEMENT_SECONDS
        signal.raise_signal(signal.SIGTERM)
        came, step = now[0], 200
        while not stop.agreed(step, now=False):
            now[0] += 0.3
            step += 1
        assert now[0] - came <= AGREEMENT_SECONDS


def test_the_interval_follows_the_slowest_process_and_is_agreed_at_need(processes):
    now, gathered = processes
    with Interruption(first=0) as stop:
        now[0] += 0.01  # this process is fast here, so the other one's 0.1 seconds decide
        stop.agreed(1, now=False)
        for step in range(2, 52):
            stop.agreed(step, now=False)
        assert len(gathered) == 2  # at steps 1 and 51
        stop.agreed(52, now=True)
        assert len(gathered) == 3


def test_one_process_stops_after_the_current_step(monkeypatch):
    monkeypatch.setattr(loop, "gather", pytest.fail)
    with Interruption(first=0) as stop:
        assert not stop.agreed(1, now=True)
        signal.raise_signal(signal.SIGINT)
        assert stop.agreed(2, now=False)
        with pytest.raises(KeyboardInterrupt):  # the second signal acts as usual
            signal.raise_signal(signal.SIGINT)
