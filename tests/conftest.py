"""Set up the whole suite: four simulated devices, checked shapes, and a compile cache.

Every shape annotation of `lwm` is enforced while the tests run. The import hook must be installed
before the package's first import, so nothing above it may import `lwm`.
"""

import os
from pathlib import Path

# Tests mostly compile, which is three times as fast when LLVM optimizes nothing, fused
# loops come from XLA's older and plainer code, and a program is one module. The flags are set
# before jax is imported, and for the processes that tests start.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    + " --xla_cpu_parallel_codegen_split_count=1"
)

# The first parallel step of a torch process is sometimes wrong by 1e-3 from one thread's first row
# on (torch 2.13 on a CPU, one process in thirty on a busy machine), so references use one thread.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 4)
# Each process of the suite has a cache, because jax reads entries that another is still writing.
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "jax"
CACHE /= os.environ.get("PYTEST_XDIST_WORKER", "main")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
install_import_hook("lwm", "shape_checking.check")

# Every run has the same examples, and a loaded machine must not fail one for its time.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")
