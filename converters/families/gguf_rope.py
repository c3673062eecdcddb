"""Rope in GGUF: fields and factor tensors <-> rope_parameters. Knows no family.

A GGUF has no kind "llama3": llama.cpp's converter writes the divisor of each frequency instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkf.converters.families.family import GgufFields, GgufModel
from rkf.converters.families.gguf_yarn import FACTOR, LENGTH, MAGNITUDE, shortest, yarn_fields, yarn_parameters
from rkf.errors import SourceError, UnsupportedError

FACTORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
EXTRA = (FACTORS, LONG, SHORT)
_KINDS = ("linear", "longrope", "none", "yarn")
_OLD_FACTOR = "rope.scale_linear"  # read where the newer key is absent; 0 means 1
# llama.cpp writes rope factors only for the kind "llama3", whose low_freq_factor is 1 in every published model.
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR = 1.0, 4.0
_TOLERANCE = 1e-5


def rope_config(model: GgufModel, head_size: int, *, tuned_yarn: bool = False) -> dict[str, Any]:
    """rope_parameters of a GGUF's fields and factors, as `load_hparams` in llama.cpp's llama-model.cpp reads them.

    tuned_yarn: see gguf_yarn. Raises UnsupportedError for an unknown kind and for scales beside factors, SourceError
    for factors that fit no kind.
    """
    own = model.own
    kind, theta = own.get("rope.scaling.type", "linear"), shortest(own.get("rope.freq_base", 10000.0))
    if kind not in _KINDS:
        raise UnsupportedError(f"rope scaling {kind!r} is not supported in a GGUF; known: {', '.join(_KINDS)}")
    given, factor = stretch(own)
    factor = 1.0 if kind == "none" else factor
    magnitude = own.get(MAGNITUDE, 1.0)
    if (LONG in model.extra) != (SHORT in model.extra):
        raise SourceError(f"tensors {LONG} and {SHORT}: expected both or none")
    beside = FACTORS if FACTORS in model.extra else LONG if LONG in model.extra else None
    if beside is not None and factor != 1:
        raise UnsupportedError(f"{given}: {factor} is not supported beside tensor {beside}; expected 1")
    if beside == LONG:
        return _longrope(model, theta)
    if kind == "yarn" and beside is None and (factor, magnitude) != (1, 1):
        return yarn_parameters(own, theta, factor, tuned_yarn)
    if magnitude != 1:
        raise UnsupportedError(f"{MAGNITUDE}: {magnitude} is not supported with rope scaling {kind!r}; expected 1")
    if beside == FACTORS:
        return llama3_parameters(model.extra[FACTORS], theta, head_size)
    if factor == 1:
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}


def stretch(own: Mapping[str, Any]) -> tuple[str, float]:
    """The field that has the factor, and the factor."""
    given = next((key for key in (FACTOR, _OLD_FACTOR) if key in own), FACTOR)
    return given, shortest(own.get(given) or 1.0)


def rope_fields(rope: Mapping[str, Any], head_size: int, *, tuned_yarn: bool = False) -> GgufFields:
    """The fields of standard rope_parameters; UnsupportedError if a GGUF has none for them."""
    kind = rope["rope_type"]
    own: dict[str, Any] = {
        "rope.dimension_count": int(head_size * rope["partial_rotary_factor"]),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if kind in ("default", "dynamic"):
        return GgufFields(own)
    if kind == "linear":
        return GgufFields(own | {"rope.scaling.type": "linear", FACTOR: float(rope["factor"])})
    if kind == "llama3":
        return GgufFields(own, {FACTORS: llama3_divisors(rope, head_size).astype(np.float32)})
    if kind == "yarn":
        return GgufFields(own | yarn_fields(rope, tuned_yarn))
    raise UnsupportedError(f"rope scaling {kind!r} cannot be stored in a GGUF written by rkf")


def _longrope(model: GgufModel, theta: float) -> dict[str, Any]:
    own, factors = model.own, {"long_factor": model.extra[LONG], "short_factor": model.extra[SHORT]}
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "original_max_position_embeddings": own.get(LENGTH) or own["context_length"],
        "attention_factor": shortest(own.get(MAGNITUDE, 1.0)),
        **{key: [shortest(float(each)) for each in values.reshape(-1)] for key, values in factors.items()},
    }


def llama3_parameters(factors: NDArray[Any], theta: float, head_size: int) -> dict[str, Any]:
    """The llama3 parameters whose frequency divisors are `factors: f32[head_size / 2]`; SourceError if there are none.

    Inverts `_compute_llama3_parameters` (transformers/modeling_rope_utils.py). Between the two thresholds the
    divisor d satisfies (1/d - 1/factor) / (1 - 1/factor) = (context / wavelength - low) / (high - low), a line over
    1 / wavelength. It has two coefficients for three unknowns, so any value of low fits; 1 is used. With one divisor
    between the thresholds the high factor is open too; 4 is used, as in every published model.
    """
    factors = np.asarray(factors, np.float64).reshape(-1)
    if factors.size != head_size // 2 or not np.all(np.isfinite(factors) & (factors >= 1)):
        raise SourceError(f"{FACTORS}: expected {head_size // 2} divisors of at least 1")
    factor = float(factors.max())
    between = (factors > 1) & (factors < factor)
    candidates = [_llama3(theta, factor, _HIGH_FREQ_FACTOR, 8192)]
    inverse_wavelength = _plain(theta, head_size)[between] / (2 * np.pi)
    smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
    if between.sum() == 1:
        turns = _LOW_FREQ_FACTOR + smooth[0] * (_HIGH_FREQ_FACTOR - _LOW_FREQ_FACTOR)
        candidates.append(_llama3(theta, factor, _HIGH_FREQ_FACTOR, round(float(turns / inverse_wavelength[0]))))
    if between.sum() >= 2:
        slope, intercept = np.polyfit(inverse_wavelength, smooth, 1)
        if slope > 0 > intercept:
            span = -_LOW_FREQ_FACTOR / intercept
            high = float(np.round(_LOW_FREQ_FACTOR + span, 3))
            candidates.append(_llama3(theta, factor, high, round(float(slope * span))))
    for rope in candidates:
        if np.allclose(llama3_divisors(rope, head_size), factors, rtol=_TOLERANCE):
            return rope
    raise SourceError(f"{FACTORS} fits no llama3 rope scaling")


def llama3_divisors(rope: Mapping[str, Any], head_size: int) -> NDArray[np.float64]:
    """The divisor of each rope frequency, `f64[head_size / 2]`."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * _plain(rope["rope_theta"], head_size) / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def _llama3(theta: float, factor: float, high: float, context: int) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": _LOW_FREQ_FACTOR,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _plain(theta: float, head_size: int) -> NDArray[np.float64]:
    return theta ** -(np.arange(0, head_size, 2) / head_size)
