"""Read and write the scaling of rotary embeddings by the keys of transformers' configurations.

Source: transformers, `modeling_rope_utils`.
"""

from collections.abc import Mapping
from typing import Any

from lwm.attention.rope import RopeScaling
from lwm.core.config import from_dict
from lwm.core.errors import CheckpointError

_ORIGINAL = "original_max_position_embeddings"
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (
        ("factor",),
        (
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}
"""The required and the optional keys of each type."""


def read_rope_scaling(data: Mapping[str, Any], source: str) -> RopeScaling | None:
    """Build the scaling from a configuration with the keys of its rope parameters; None if there
    is none. Raise CheckpointError for a type that is not supported."""
    kind = data.get("rope_type") or data.get("type") or "default"
    if data.get("partial_rotary_factor") not in (None, 1):
        raise CheckpointError(
            f"{source} rotates a part of each head, partial_rotary_factor "
            f"{data['partial_rotary_factor']!r}; only whole heads are supported"
        )
    if kind == "default":
        return None
    longest = data.get("max_position_embeddings") or 2048
    original = data.get(_ORIGINAL) or longest
    if kind == "longrope" and _is_constant(data):
        values = {"rope_type": "factors", "factors": data["long_factor"], _ORIGINAL: original}
        return from_dict(RopeScaling, values, source)
    if not isinstance(kind, str) or kind not in _KEYS:
        raise CheckpointError(
            f"{source} scales its rotary embedding by {kind!r}; supported are {', '.join(_KEYS)}"
        )
    required, optional = _KEYS[kind]
    values = {key: data[key] for key in (*required, *optional) if data.get(key) is not None}
    if kind == "dynamic":
        original = longest
    if kind == "yarn" and "factor" not in values and _are_numbers(longest, original):
        values["factor"] = longest / original
    for key in required:
        if key not in values:
            raise CheckpointError(
                f"{source}: the rope scaling {kind!r} has no {key!r}; correct config.json"
            )
    return from_dict(RopeScaling, {"rope_type": kind, _ORIGINAL: original, **values}, source)


def _is_constant(data: Mapping[str, Any]) -> bool:
    """Return whether longrope divides frequencies by the same factors at any length."""
    same = data.get("long_factor") == data.get("short_factor")
    return same and "long_factor" in data and data.get("attention_factor") == 1


def _are_numbers(*values: Any) -> bool:
    return all(type(value) in (int, float) and value > 0 for value in values)


def rope_scaling_keys(scaling: RopeScaling) -> dict[str, Any]:
    """Return the keys of a configuration that describe a scaling."""
    original = scaling.original_max_position_embeddings
    if scaling.rope_type == "dynamic":  # its formula begins at max_position_embeddings
        keys = {"rope_type": "dynamic", "factor": scaling.factor}
        return {"rope_scaling": keys, "max_position_embeddings": original}
    if scaling.rope_type == "factors":
        factors = list(scaling.factors)
        keys = {
            "rope_type": "longrope", "short_factor": factors, "long_factor": factors,
            "factor": 1.0, "attention_factor": 1.0, _ORIGINAL: original,
        }  # fmt: skip
        return {"rope_scaling": keys, _ORIGINAL: original}
    required, optional = _KEYS[scaling.rope_type]
    values = {key: getattr(scaling, key) for key in (*required, *optional)}
    keys = {key: value for key, value in values.items() if value is not None}
    keys["rope_type"] = scaling.rope_type
    if scaling.rope_type != "linear":
        keys[_ORIGINAL] = original
    return {"rope_scaling": keys, _ORIGINAL: original}
