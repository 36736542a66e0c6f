"""Read `--config` for the original's checkpoints: the name of a size, or a JSON file with the
original's keys."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge
from pydantic import StrictBool, StrictFloat, StrictInt

from lwm.core.config import from_dict, read_json
from lwm.core.errors import ConfigError
from lwm.models import sizes
from lwm.models.llama import LlamaConfig
from lwm.models.vision_tokens import VisionVocabulary

_ALIASES = {"rope_theta": "theta", "max_position_embeddings": "max_sequence_length"}
"""Keys of newer files and the original's."""


@dataclass(frozen=True, kw_only=True)
class OriginalSettings:
    """Declare the keys that describe a model; the others are ignored.

    The original fixes 8192 codes, 256 per frame, and 256 rows above them in its vision table. So
    without `vision_codes`, which is our key, a table of more than 256 rows is taken to have that
    form, and a smaller one to hold codes and two end tokens.
    """

    vocab_size: StrictInt
    hidden_size: StrictInt
    intermediate_size: StrictInt
    num_hidden_layers: StrictInt
    num_attention_heads: Annotated[StrictInt, Ge(1)]
    num_key_value_heads: StrictInt | None = None
    max_sequence_length: StrictInt = 2048
    rms_norm_eps: StrictFloat = 1e-6
    theta: StrictFloat = 10000.0
    initializer_range: StrictFloat = 0.02
    tie_word_embeddings: StrictBool = False
    param_scan_axis: Literal[0, 1] = 0
    vision_vocab_size: StrictInt | None = None
    vision_codes: StrictInt | None = None
    vision_codes_per_frame: StrictInt = 256

    def vision(self) -> VisionVocabulary | None:
        """Return the vision ids; None for a text model."""
        size, codes = self.vision_vocab_size, self.vision_codes
        if size is None:
            return None
        if codes is None:
            codes = size - 256 if size > 256 else size - 2
        return VisionVocabulary(
            size=size, codes=codes, codes_per_frame=self.vision_codes_per_frame
        )


def read_settings(config: str | None) -> tuple[LlamaConfig, int]:
    """Return the model's configuration and the axis on which its layers are stacked.

    Raises:
        ConfigError: `config` is missing, or neither a size nor a valid file.
    """
    if config is None:
        raise ConfigError(
            "this checkpoint does not contain its configuration; add --config with a size "
            f"({', '.join(sizes.NAMES)}) or a JSON file of the original's settings"
        )
    if config in sizes.NAMES:
        return sizes.size(config), 0
    if not Path(config).is_file():
        raise ConfigError(
            f"--config {config!r} is neither a size ({', '.join(sizes.NAMES)}) nor a file; "
            "correct it"
        )
    data = read_json(Path(config))
    data = {_ALIASES.get(key, key): value for key, value in data.items() if value is not None}
    if "size" in data:
        data = _settings_of(sizes.size(str(data["size"]))) | data
    names = {field.name for field in fields(OriginalSettings)}
    settings = from_dict(
        OriginalSettings, {key: value for key, value in data.items() if key in names}, config
    )
    heads = settings.num_attention_heads
    if settings.num_key_value_heads not in (None, heads):
        raise ConfigError(
            f"{config}: num_key_value_heads is {settings.num_key_value_heads}, but the original "
            f"has one for each of its {heads} heads; correct the file"
        )
    if settings.hidden_size % heads:
        raise ConfigError(
            f"{config}: hidden_size ({settings.hidden_size}) must be a multiple of "
            f"num_attention_heads ({heads})"
        )
    model = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_layers=settings.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=settings.hidden_size // heads,
        max_sequence_length=settings.max_sequence_length,
        rope_theta=settings.theta,
        rms_norm_eps=settings.rms_norm_eps,
        tie_embeddings=settings.tie_word_embeddings,
        initializer_range=settings.initializer_range,
        vision=settings.vision(),
    )
    return model, settings.param_scan_axis


def _settings_of(model: LlamaConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "max_sequence_length": model.max_sequence_length,
        "rms_norm_eps": model.rms_norm_eps,
        "theta": model.rope_theta,
        "initializer_range": model.initializer_range,
    }
