"""Eyes for a text model: fresh entries for the ids of vision behind those of text, and whether a
VQGAN's codes are those ids.

The entries mean nothing until they are trained; what the model knows of text stays as it is.

Source: LargeWorldModel paper (arXiv 2402.08268), section 4.2: its vision-language models start so.
"""

from dataclasses import replace

import numpy as np

from lwm.checkpoints.checkpoint import Checkpoint
from lwm.checkpoints.names import NATIVE, named_specs
from lwm.core.errors import ConfigError
from lwm.models.llama import LlamaConfig
from lwm.models.vision_tokens import VisionVocabulary
from lwm.models.vqgan import VQGANConfig

SPARE = 256
"""Ids behind the codes: the two end tokens, and room that keeps the table's size round."""


def add_vision(checkpoint: Checkpoint, vision: VisionVocabulary, *, seed: int = 0) -> Checkpoint:
    """The checkpoint of a model that sees, made of one that does not.

    Raises:
        ConfigError: it sees already.
    """
    if checkpoint.config.vision is not None:
        raise ConfigError(
            f"{checkpoint.source} sees already ({checkpoint.config.vision.size} ids of vision); "
            "leave --add-vision out"
        )
    config = replace(checkpoint.config, vision=vision)
    tensors = WidenedTensors(checkpoint, config, seed)
    return replace(checkpoint, config=config, table=NATIVE, tensors=tensors)


class WidenedTensors:
    """Tensors of a text model, those with an entry for each id made longer."""

    def __init__(self, base: Checkpoint, config: LlamaConfig, seed: int) -> None:
        self._read, self._seed = base.reader(), seed
        self._specs, self._deviation = named_specs(config), config.initializer_range

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in self._specs.items()}

    def read(self, name: str) -> np.ndarray:
        array, spec = self._read(name), self._specs[name]
        if array.shape == spec.shape:
            return array
        axis = spec.axes.index("vocab")
        missing = list(spec.shape)
        missing[axis] -= array.shape[axis]
        # Embedding and head must not be the same numbers.
        random = np.random.default_rng([self._seed, *name.encode()])
        fresh = random.standard_normal(missing, np.float32) * np.float32(self._deviation)
        return np.concatenate([array, fresh.astype(array.dtype)], axis=axis)


def vocabulary_for(codes: int, codes_per_frame: int) -> VisionVocabulary:
    return VisionVocabulary(size=codes + SPARE, codes=codes, codes_per_frame=codes_per_frame)


def require_codebook(codec: VQGANConfig, vqgan: str, config: LlamaConfig, source: str) -> None:
    """Refuses a VQGAN whose codes are not those of the model.

    Args:
        vqgan: what the VQGAN is called, and `source` the model, in messages.

    Raises:
        ConfigError: names both.
    """
    codes, per_frame = codec.codebook_size, codec.codes_per_frame
    if config.vision is None:
        raise ConfigError(
            f"{source} is a text model and has no use for the VQGAN {vqgan}; add --add-vision "
            "when it is converted, or leave --vqgan out"
        )
    if (codes, per_frame) != (config.vision.codes, config.vision.codes_per_frame):
        raise ConfigError(
            f"the VQGAN {vqgan} has {codes} codes, {per_frame} a frame, and {source} "
            f"{config.vision.codes}, {config.vision.codes_per_frame} a frame; take the one that "
            "belongs to the model, or, where its --config leaves that open, say vision_codes and "
            "vision_codes_per_frame in it"
        )
