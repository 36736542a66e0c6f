"""Eyes for a text model: fresh entries for the ids of vision behind those of text, and the VQGAN
whose codes they are.

The entries mean nothing until they are trained; what the model knows of text stays as it is. Knows
the sizes of a VQGAN from its settings; reads none of its weights.

Source: LargeWorldModel paper (arXiv 2402.08268), section 4.2: its vision-language models start so.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from lwm.checkpoints.checkpoint import Checkpoint
from lwm.checkpoints.names import NATIVE, named_specs
from lwm.core.config import read_json
from lwm.core.errors import CheckpointError, ConfigError
from lwm.models.llama import LlamaConfig
from lwm.models.world import VisionVocabulary

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


def codebook_of(vqgan: Path) -> tuple[int, int]:
    """Codes of a VQGAN's directory, and how many make a frame.

    Raises:
        CheckpointError: it is no directory of a VQGAN.
    """
    if not (vqgan / "config.json").is_file() or not (vqgan / "model.safetensors").is_file():
        raise CheckpointError(
            f"{vqgan} holds no config.json and model.safetensors; name a VQGAN's directory"
        )
    settings = read_json(vqgan / "config.json").get("vqgan")
    match settings:
        case {
            "codebook_size": int(codes),
            "image_size": int(size),
            "channel_multipliers": [_, *further],
        } if codes > 0 and size > 0:
            return codes, (size >> len(further)) ** 2
    raise CheckpointError(
        f"{vqgan}/config.json holds no settings of a VQGAN; name a VQGAN's directory"
    )


def require_codebook(vqgan: Path, config: LlamaConfig, source: str) -> None:
    """Refuses a VQGAN whose codes are not those of the model.

    Raises:
        ConfigError: names both.
    """
    codes, per_frame = codebook_of(vqgan)
    if config.vision is None:
        raise ConfigError(
            f"{source} is a text model and has no use for the VQGAN {vqgan}; add --add-vision or "
            "leave --vqgan out"
        )
    if codes > config.vision.codes or per_frame != config.vision.codes_per_frame:
        raise ConfigError(
            f"the VQGAN {vqgan} has {codes} codes, {per_frame} a frame, and {source} "
            f"{config.vision.codes}, {config.vision.codes_per_frame} a frame; take the one that "
            "belongs to the model"
        )
