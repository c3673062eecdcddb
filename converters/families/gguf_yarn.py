"""The rope scaling "yarn" in GGUF: fields <-> rope_parameters. Knows no family.

llama.cpp multiplies the attention factor that follows from the factor by rope.scaling.attn_factor, and always rounds
the edges of the ramp to whole pairs. In a few architectures ("tuned") it also reads the two betas, and
yarn_log_multiplier: mscale_all_dim, with an mscale of 1. In others it ignores these fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rkf.converters.families.rope_scaling import yarn_attention
from rkf.errors import UnsupportedError

FACTOR, LENGTH = "rope.scaling.factor", "rope.scaling.original_context_length"
MAGNITUDE, MULTIPLIER = "rope.scaling.attn_factor", "rope.scaling.yarn_log_multiplier"
_BETAS = {"beta_fast": ("rope.scaling.yarn_beta_fast", 32.0), "beta_slow": ("rope.scaling.yarn_beta_slow", 1.0)}


def yarn_parameters(own: Mapping[str, Any], theta: float, factor: float, tuned: bool) -> dict[str, Any]:
    """rope_parameters of the fields."""
    found = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": own.get(LENGTH) or own["context_length"],
    }
    if tuned:
        found |= {key: shortest(own.get(field, default)) for key, (field, default) in _BETAS.items()}
        if own.get(MULTIPLIER):
            found |= {"mscale": 1.0, "mscale_all_dim": shortest(own[MULTIPLIER])}
    if own.get(MAGNITUDE, 1.0) != 1:
        found["attention_factor"] = own[MAGNITUDE] * yarn_attention(found, factor)
    return found


def yarn_fields(rope: Mapping[str, Any], tuned: bool) -> dict[str, Any]:
    """The fields of standard rope_parameters; UnsupportedError for what llama.cpp computes in another way."""
    if not rope.get("truncate", True):
        raise UnsupportedError("truncate: False is not supported; llama.cpp always rounds the edges of yarn's ramp")
    factor, length = rope.get("factor"), rope["original_max_position_embeddings"]
    if factor is None:
        raise UnsupportedError("rope_parameters: factor: expected a number; a GGUF cannot store yarn without one")
    betas = {key: float(rope.get(key) or default) for key, (_, default) in _BETAS.items()}
    for key, (_, default) in _BETAS.items():
        if not tuned and betas[key] != default:
            raise UnsupportedError(f"{key}: {betas[key]} is not supported; llama.cpp assumes {default} here")
    fields = {
        "rope.scaling.type": "yarn",
        FACTOR: float(factor),
        LENGTH: int(length),
        **{field: betas[key] for key, (field, _) in _BETAS.items()},
    }
    magnitude = yarn_attention(rope, factor) / yarn_attention({}, factor)
    return fields if math.isclose(magnitude, 1, rel_tol=1e-7) else fields | {MAGNITUDE: magnitude}


def shortest(value: Any) -> Any:
    """The shortest decimal that rounds to the same f32: probably the number that the model's author wrote."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
