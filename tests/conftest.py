"""Four simulated devices, checked shapes and a compile cache for the whole suite, and the tiny
model that several rooms share.

Every shape annotation of `lwm` is enforced while the tests run: the hook must stand before the
package's first import, so nothing above it may import `lwm`.
"""

from pathlib import Path

import hypothesis
import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update(
    "jax_compilation_cache_dir", str(Path(__file__).resolve().parents[1] / ".cache" / "jax")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
install_import_hook("lwm", "shape_checking.check")

# The same examples on every run; a machine under load must not fail an example for its time.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")
