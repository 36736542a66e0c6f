"""lwm: the Large World Model, whole and reproducible.

`lwm.load` gives a model that scores, continues and converses, `lwm.load_vqgan` one that turns
pictures into codes and back; everything else is in the rooms
(`docs/architecture.md`). Names load on first use, so that the command line can answer `--help`
without waiting for jax.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lwm.core.errors import LwmError
    from lwm.generation.codec import VqganCodec, load_vqgan
    from lwm.generation.load import load
    from lwm.generation.model import Logits, Model

__all__ = ["Logits", "LwmError", "Model", "VqganCodec", "load", "load_vqgan"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LwmError":
        from lwm.core import errors

        return errors.LwmError
    if name == "load":
        from lwm.generation.load import load

        return load
    if name in ("VqganCodec", "load_vqgan"):
        from lwm.generation import codec

        return getattr(codec, name)
    if name in __all__:
        from lwm.generation import model

        return getattr(model, name)
    raise AttributeError(f"module 'lwm' has no attribute {name!r}")
