"""Four simulated devices, checked shapes and a compile cache for the whole suite, and the tiny
model that several rooms share.

Every shape annotation of `lwm` is enforced while the tests run: the hook must stand before the
package's first import, so nothing above it may import `lwm`.
"""

import os
from pathlib import Path

# Compiling is what the tests spend their time on; it takes a third as long when LLVM optimises
# nothing, fused loops come from XLA's older and plainer code, and a program is one module. Set
# before jax is imported, and for the processes that tests start.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    + " --xla_cpu_parallel_codegen_split_count=1"
)

import hypothesis
import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 4)
# A cache for each process that shares the suite: jax reads entries that another is writing.
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "jax"
CACHE /= os.environ.get("PYTEST_XDIST_WORKER", "alone")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
install_import_hook("lwm", "shape_checking.check")

# The same examples on every run; a machine under load must not fail an example for its time.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")
