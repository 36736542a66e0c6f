"""lwm: the Large World Model, whole and reproducible.

`lwm.load` gives a model that scores, continues and converses; everything else is in the rooms (`docs/architecture.md`).
"""

from lwm.core.errors import LwmError
from lwm.inference.model import Logits, Model, load

__all__ = ["Logits", "LwmError", "Model", "load"]
__version__ = "0.1.0"
