"""Add vision ids to a text model, and check that a VQGAN's codes are a model's vision ids.

The new entries of embedding and head are random until they are trained; the text model does not
change.

Source: LargeWorldModel paper (arXiv 2402.08268), section 4.2, which starts its vision-language
models this way.
"""

from dataclasses import replace

import numpy as np

from lwm.checkpoints.checkpoint import Checkpoint
from lwm.checkpoints.names import LWM_NAMES, named_specs
from lwm.core.errors import ConfigError
from lwm.models.llama import LlamaConfig
from lwm.models.vision_tokens import VisionVocabulary
from lwm.models.vqgan import VQGANConfig

SPARE_IDS = 256
"""Ids after the codes: the two end tokens, and unused ones that keep the table's size round."""


def add_vision(checkpoint: Checkpoint, vision: VisionVocabulary, *, seed: int = 0) -> Checkpoint:
    """Return the checkpoint of a vision-language model made from a text model."""
    if checkpoint.config.vision is not None:
        size = checkpoint.config.vision.size
        raise ConfigError(f"{checkpoint.source} has {size} vision ids already; omit --add-vision")
    config = replace(checkpoint.config, vision=vision)
    tensors = _ExtendedTensors(checkpoint, config, seed)
    return replace(checkpoint, config=config, table=LWM_NAMES, tensors=tensors, quantized=None)


class _ExtendedTensors:
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
        # The name is part of the seed because embedding and head must not be equal.
        random = np.random.default_rng([self._seed, *name.encode()])
        added = random.standard_normal(missing, np.float32) * np.float32(self._deviation)
        return np.concatenate([array, added.astype(array.dtype)], axis=axis)


def vocabulary_for(codes: int, codes_per_frame: int) -> VisionVocabulary:
    """Return the vision ids for a codebook of `codes` entries."""
    return VisionVocabulary(size=codes + SPARE_IDS, codes=codes, codes_per_frame=codes_per_frame)


def require_codebook(codec: VQGANConfig, vqgan: str, config: LlamaConfig, source: str) -> None:
    """Refuse a VQGAN whose codes are not the model's; `vqgan` and `source` name them."""
    codes, per_frame = codec.codebook_size, codec.codes_per_frame
    if config.vision is None:
        raise ConfigError(
            f"{source} is a text model and cannot use the VQGAN {vqgan}; add --add-vision when "
            "converting it, or omit --vqgan"
        )
    if (codes, per_frame) != (config.vision.codes, config.vision.codes_per_frame):
        raise ConfigError(
            f"the VQGAN {vqgan} has {codes} codes, {per_frame} per frame, and {source} has "
            f"{config.vision.codes}, {config.vision.codes_per_frame} per frame; use the model's "
            "VQGAN, or set vision_codes and vision_codes_per_frame in its --config"
        )
