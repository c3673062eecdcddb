"""The rope scaling "yarn" in GGUF: fields <-> rope_parameters. Knows no family.

llama.cpp computes the attention factor from the factor alone, or from it and yarn_log_multiplier (mscale_all_dim, with
an mscale of 1). It always rounds the edges of the ramp to whole pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rkf.errors import SourceError, UnsupportedError

_FACTOR, _LENGTH = "rope.scaling.factor", "rope.scaling.original_context_length"
_ATTENTION, MULTIPLIER = "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_log_multiplier"
_BETAS = {"beta_fast": ("rope.scaling.yarn_beta_fast", 32.0), "beta_slow": ("rope.scaling.yarn_beta_slow", 1.0)}


def yarn_parameters(own: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """rope_parameters of the fields."""
    for key in (_FACTOR, _LENGTH):
        if key not in own:
            raise SourceError(f"field {key} is missing")
    found = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": shortest(own[_FACTOR]),
        "original_max_position_embeddings": own[_LENGTH],
        **{key: shortest(own.get(field, default)) for key, (field, default) in _BETAS.items()},
    }
    if own.get(MULTIPLIER):
        found |= {"mscale": 1.0, "mscale_all_dim": shortest(own[MULTIPLIER])}
    if own.get(_ATTENTION) is not None:
        found["attention_factor"] = shortest(own[_ATTENTION])
    return found


def yarn_fields(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of standard rope_parameters; UnsupportedError for what llama.cpp computes in another way."""
    if not rope.get("truncate", True):
        raise UnsupportedError("truncate: False is not supported; llama.cpp always rounds the edges of yarn's ramp")
    factor, length = rope.get("factor"), rope["original_max_position_embeddings"]
    if factor is None:
        raise UnsupportedError("rope_parameters: factor: expected a number; a GGUF cannot store yarn without one")
    fields = {
        "rope.scaling.type": "yarn",
        _FACTOR: float(factor),
        _LENGTH: int(length),
        **{field: float(rope.get(key) or default) for key, (field, default) in _BETAS.items()},
    }
    given, usual = rope.get("attention_factor"), 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    if given is not None and not math.isclose(given, usual, rel_tol=1e-6):
        raise UnsupportedError(f"attention_factor: {given} is not supported; llama.cpp computes {usual:.7g}")
    if given is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        if rope["mscale"] != 1:
            raise UnsupportedError(f"mscale: {rope['mscale']} is not supported; llama.cpp assumes 1")
        fields[MULTIPLIER] = float(rope["mscale_all_dim"])
    return fields


def shortest(value: Any) -> Any:
    """The shortest decimal that rounds to the same f32: probably the number that the model's author wrote."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
