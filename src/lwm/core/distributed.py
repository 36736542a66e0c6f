"""More than one process: joining them, and deciding something together.

Source: `jax.distributed`, which does the work; under Slurm, GKE and on TPU pods it finds its peers
by itself.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lwm.core import errors
from lwm.core.errors import ConfigError, LwmError
from lwm.core.progress import say

# jax and numpy are imported where they are used: the settings below stand on the command line,
# whose --help must not wait for them.


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
    """Joins the other processes; alone or joined already, does nothing. Must come before jax looks
    for devices.

    Where the others do not come in time, the process ends with one sentence and exit code 2.

    Raises:
        ConfigError: the processes contradict each other.
    """
    cluster = _cluster() if config.auto == "yes" else None
    if not config.coordinator and cluster is None:
        return
    import jax

    if jax.distributed.is_initialized():
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


def first_process() -> bool:
    """Whether this is process 0, which alone writes files and speaks for all; alone, it is."""
    import jax

    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; every process must ask at the same point."""
    return bool(_gather(flag).any())


def _gather(own: Any) -> Any:
    """The same array of every process, [processes, ...]."""
    import numpy as np
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.asarray(own))


_LONGEST = 4096
"""Bytes of a sentence that goes to the other processes."""


@contextmanager
def together() -> Iterator[None]:
    """A user's mistake, or a file's fault, that one process meets in this block ends all of them
    with its sentence; otherwise the others would wait for it for ever. Every process must come
    here.

    Blocks may be nested, and an error outside the inner one still meets those who are in it. It
    does not meet those who compute together meanwhile: what may fail in one process alone needs a
    block of its own, without computation.

    Raises:
        LwmError: of the first process that met one.
    """
    import jax
    import numpy as np

    if jax.process_count() == 1:
        yield
        return
    fault = None
    try:
        yield
    except LwmError as error:
        if error.agreed:  # of a block within, or of one around it in another process
            raise
        fault = error
    except OSError as error:
        fault = errors.InputError(
            f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
        )
    told = b"" if fault is None else f"{type(fault).__name__} {fault}".encode()[:_LONGEST]
    own = np.zeros(_LONGEST, np.uint8)
    own[: len(told)] = np.frombuffer(told, np.uint8)
    for number, row in enumerate(_gather(own)):
        if row.any():
            if number != jax.process_index() or fault is None:
                kind, _, text = row.tobytes().rstrip(b"\0").decode(errors="ignore").partition(" ")
                fault = getattr(errors, kind, LwmError)(text)
            fault.agreed = True
            raise fault


def from_first(work: Callable[[], Any]) -> Any:
    """What process 0 alone does, and in every process what comes of it, which must be JSON.

    Raises:
        LwmError: what it raised, in every process.
    """
    import jax

    found = None
    with together():
        if first_process():
            found = work()
    if jax.process_count() == 1:
        return found
    import numpy as np
    from jax.experimental import multihost_utils

    own = np.frombuffer(json.dumps(found).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(own))))
    data = own if first_process() else np.zeros(size, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(data).tobytes())


def on_host(x: Any) -> Any:
    """The whole of an array in every process, as numpy. Where no process has all of it, each
    device holds it whole for a moment."""
    import numpy as np

    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)
