"""Train, evaluate, run and convert Large World Models.

`lwm.load` opens a model that scores, continues and converses; `lwm.load_vqgan` opens a model that
encodes images as codes and decodes them. `docs/architecture.md` describes the packages. Names are
imported on first use, so that the command line answers `--help` without loading jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lwm.core.errors import LwmError
    from lwm.generation.codec import VqganCodec, load_vqgan
    from lwm.generation.load import load
    from lwm.generation.model import Logits, Model

__all__ = ["Logits", "LwmError", "Model", "VqganCodec", "load", "load_vqgan"]
__version__ = "0.1.0"

_MODULES = {
    "Logits": "lwm.generation.model",
    "LwmError": "lwm.core.errors",
    "Model": "lwm.generation.model",
    "VqganCodec": "lwm.generation.codec",
    "load": "lwm.generation.load",
    "load_vqgan": "lwm.generation.codec",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lwm' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
