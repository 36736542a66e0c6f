"""Join several processes into one run, and agree on errors and values across them.

Built on `jax.distributed`, which finds its peers by itself under Slurm, on GKE and on TPU pods.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from lwm.core import errors
from lwm.core.config import Checked
from lwm.core.errors import ConfigError, LwmError
from lwm.core.progress import say

# jax and numpy are imported where they are used: the command line shows the settings below, and
# --help must not wait for these imports.


@dataclass(frozen=True, kw_only=True)
class DistributedConfig(Checked, section="distributed"):
    """Set which processes work together."""

    coordinator: str = ""
    """HOST:PORT of process 0, the same in every process; needs `processes` and `process`."""
    processes: int = 0
    """Number of processes."""
    process: int = -1
    """Index of this process, from 0."""
    auto: Literal["yes", "no"] = "yes"
    """Detect the other processes under Slurm, GKE, MPI and on TPU pods."""
    timeout: Annotated[int, Ge(1)] = 300
    """Seconds to wait for the other processes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = (bool(self.coordinator), self.processes > 0, self.process >= 0)
        if any(parts) and not all(parts):
            raise ConfigError(
                "distributed.coordinator, distributed.processes and distributed.process go "
                f"together, but got {self.coordinator!r}, {self.processes} and {self.process}; "
                "set all three or none"
            )
        if self.coordinator and not 0 <= self.process < self.processes:
            raise ConfigError(
                f"distributed.process is {self.process}; with {self.processes} processes it must "
                f"be from 0 to {self.processes - 1}"
            )


_TPU_PEERS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")


def _cluster() -> str | None:
    """Name the cluster manager that started this process as one of several, if any did."""

    def several(name: str) -> bool:
        return os.environ.get(name, "1").isdigit() and int(os.environ.get(name, "1")) > 1

    # srun sets this one; in a batch script, which is one process, only SLURM_NTASKS is set.
    if several("SLURM_STEP_NUM_TASKS") and "SLURM_PROCID" in os.environ:
        return "Slurm"
    if several("OMPI_COMM_WORLD_SIZE"):
        return "MPI"
    if any("," in os.environ.get(name, "") for name in _TPU_PEERS):
        return "a TPU pod"
    if os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu") and any(
        Path("/dev").glob("accel[0-9]*")
    ):
        return "a TPU pod"  # its virtual machines find each other through their metadata server
    if "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:
        return "several TPU slices"
    if "JOB_COMPLETION_INDEX" in os.environ and "JAX_COORDINATOR_ADDRESS" in os.environ:
        return "Kubernetes"
    return None


def join(config: DistributedConfig) -> None:
    """Join the other processes, before jax looks for devices.

    Does nothing if there are none or they are joined already. If the others do not arrive in time,
    the process exits with one sentence and code 2. Contradicting settings raise ConfigError.
    """
    cluster = _cluster() if config.auto == "yes" else None
    if not config.coordinator and cluster is None:
        return
    import jax

    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    settings = {}
    if config.coordinator:
        settings = {
            "coordinator_address": config.coordinator,
            "num_processes": config.processes,
            "process_id": config.process,
            "cluster_detection_method": "deactivate",
        }
    group = (
        f"the {config.processes} processes"
        if config.coordinator
        else f"the processes of {cluster}"
    )
    late = (
        f"{group} did not connect to {config.coordinator or 'the coordinator'} within "
        f"{config.timeout} seconds; start every process, and check that each can reach it"
        f"{'' if config.coordinator else ', or add --distributed.auto no to run without them'}"
    )

    def give_up() -> None:
        say(f"lwm: {late}")
        os._exit(ConfigError.exit_code)

    # At its own timeout jax aborts the process with a stack trace, which cannot be caught.
    watch = threading.Timer(config.timeout, give_up)
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(**settings, initialization_timeout=config.timeout + 60)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{late} ({' '.join(str(error).split())[:200]})") from error
    finally:
        watch.cancel()


def first_process() -> bool:
    """Return whether this is process 0, the only one that writes files and logs."""
    import jax

    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Return whether the flag is set in any process; a collective call."""
    return bool(gather(flag).any())


def gather(array: Any) -> Any:
    """Return this array from every process, as [processes, ...]."""
    import numpy as np
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.asarray(array))


_MESSAGE_BYTES = 4096
"""Size of the buffer that carries an error message to the other processes."""


@contextmanager
def together() -> Iterator[None]:
    """Raise an error that any process meets in this block in all of them.

    Without it, the other processes would wait for the failed one forever. Every process must enter
    the block. Blocks may be nested: an error in the outer one reaches processes that are in the
    inner one. It does not reach processes inside a collective computation, so work that can fail
    in only one process belongs in a separate block without computation.
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
        if error.agreed:  # raised by an inner block, or by an outer one in another process
            raise
        fault = error
    except OSError as error:
        fault = errors.InputError(
            f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
        )
    text = "" if fault is None else f"{type(fault).__name__} {fault}"
    message = np.frombuffer(text.encode(errors="replace")[:_MESSAGE_BYTES], np.uint8)
    buffer = np.zeros(_MESSAGE_BYTES, np.uint8)
    buffer[: len(message)] = message
    for number, row in enumerate(gather(buffer)):
        if row.any():
            if number != jax.process_index() or fault is None:
                kind, _, text = row.tobytes().rstrip(b"\0").decode(errors="ignore").partition(" ")
                fault = getattr(errors, kind, LwmError)(text)
            fault.agreed = True
            raise fault


def from_first(work: Callable[[], Any]) -> Any:
    """Run `work` in process 0 and return its result, JSON data, or raise its error everywhere."""
    import jax

    result = None
    with together():
        if first_process():
            result = work()
    if jax.process_count() == 1:
        return result
    import numpy as np
    from jax.experimental import multihost_utils

    encoded = np.frombuffer(json.dumps(result).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(encoded))))
    data = encoded if first_process() else np.zeros(size, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(data).tobytes())


def on_host(x: Any) -> Any:
    """Return the whole array in every process, as numpy.

    If no process has all of it, each device needs memory for the whole array for a moment.
    """
    import numpy as np

    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)
