"""More than one process: joining them, and deciding something together.

Source: `jax.distributed`, which does the work; under Slurm, GKE and on TPU pods it finds its peers
by itself.
"""

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from lwm.core.errors import ConfigError
from lwm.core.progress import say


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Which processes work together."""

    coordinator: str = ""
    """HOST:PORT of process 0, the same in every process; with `processes` and `process`."""
    processes: int = 0
    """How many processes there are."""
    process: int = -1
    """Which of them this is, from 0."""
    auto: Literal["yes", "no"] = "yes"
    """Whether to find the others by itself under Slurm, GKE, MPI and on TPU pods."""
    timeout: int = 300
    """Seconds to wait for the other processes."""

    def __post_init__(self) -> None:
        given = (bool(self.coordinator), self.processes > 0, self.process >= 0)
        if any(given) and not all(given):
            raise ConfigError(
                "distributed.coordinator, distributed.processes and distributed.process belong "
                f"together, but got {self.coordinator!r}, {self.processes} and {self.process}; "
                "give all three or none"
            )
        if self.coordinator and not 0 <= self.process < self.processes:
            raise ConfigError(
                f"distributed.process is {self.process}; with {self.processes} processes it must "
                f"be from 0 to {self.processes - 1}"
            )
        if self.timeout < 1:
            raise ConfigError(
                f"distributed.timeout is {self.timeout}; it must be at least 1 second"
            )


_TPU_PEERS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")


def _cluster() -> str | None:
    """The cluster this process was started by as one of several, from what it sets."""

    def several(name: str) -> bool:
        return os.environ.get(name, "1").isdigit() and int(os.environ.get(name, "1")) > 1

    # Set by srun; in the script around it, which is one process, only SLURM_NTASKS is.
    if several("SLURM_STEP_NUM_TASKS") and "SLURM_PROCID" in os.environ:
        return "Slurm"
    if several("OMPI_COMM_WORLD_SIZE"):
        return "MPI"
    if any("," in os.environ.get(name, "") for name in _TPU_PEERS):
        return "a TPU pod"
    if os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu") and any(
        Path("/dev").glob("accel[0-9]*")
    ):
        return "a TPU pod"  # a virtual machine of one asks its metadata server for the others
    if "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:
        return "several TPU slices"
    if "JOB_COMPLETION_INDEX" in os.environ and "JAX_COORDINATOR_ADDRESS" in os.environ:
        return "Kubernetes"
    return None


def join(config: DistributedConfig) -> None:
    """Joins the other processes; alone, does nothing. Must come before jax looks for devices.

    Where the others do not come in time, the process ends with one sentence and exit code 2.

    Raises:
        ConfigError: the processes contradict each other.
    """
    cluster = _cluster() if config.auto == "yes" else None
    if not config.coordinator and cluster is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    given = {}
    if config.coordinator:
        given = {
            "coordinator_address": config.coordinator,
            "num_processes": config.processes,
            "process_id": config.process,
            "cluster_detection_method": "deactivate",
        }
    what = f"the {config.processes} processes" if config.coordinator else f"those of {cluster}"
    late = (
        f"{what} did not come together at {config.coordinator or 'the coordinator'} within "
        f"{config.timeout} seconds; start every process, and check that each reaches it"
        f"{'' if config.coordinator else ', or add --distributed.auto no to work alone'}"
    )

    def give_up() -> None:
        say(f"lwm: {late}")
        os._exit(ConfigError.exit_code)

    # When its own time is up, jax ends the process with a stack trace and lets nobody catch it.
    watch = threading.Timer(config.timeout, give_up)
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(**given, initialization_timeout=config.timeout + 60)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{late} ({' '.join(str(error).split())[:200]})") from error
    finally:
        watch.cancel()


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; every process must ask at the same point."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(flag)).any())
