"""Configuration keys of foreign checkpoints -> ModelConfig, and the tensors that a configuration implies. Tables.

Every quirk of a family ends here: what ModelConfig cannot say is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rkf.config import ModelConfig, RopeScaling
from rkf.converters.names import HEAD
from rkf.errors import SourceError, UnsupportedError


@dataclass(frozen=True, slots=True)
class Family:
    """What sets one architecture apart.

    required: layer tensors that it always has beyond those that every model has. defaults: values that its config.json
    may leave out.
    """

    name: str
    required: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


_BIASES = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")

# Keyed by config.json's model_type, and by general.architecture of a GGUF (where Mistral is a "llama").
FAMILIES = {
    family.name: family
    for family in (
        Family("llama"),
        # transformers' MistralConfig has a window of 4096 unless config.json says otherwise.
        Family("mistral", defaults={"sliding_window": 4096}),
        Family("qwen2", required=_BIASES),
        Family("qwen3", required=_NORMS, defaults={"head_dim": 128}),
    )
}

# ModelConfig field -> config.json key.
HF_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "context_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
}
# ModelConfig field -> GGUF key, behind "<architecture>.".
GGUF_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "layers": "block_count",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "context_length": "context_length",
    "norm_epsilon": "attention.layer_norm_rms_epsilon",
}

# config.json keys that change the arithmetic: key -> the only values that ModelConfig can express.
HF_FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "partial_rotary_factor": (1, 1.0, None),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
}
GGUF_FIXED: Mapping[str, tuple[Any, ...]] = {"expert_count": (0, None)}

# llama.cpp writes rope factors only for the kind "llama3", whose low_freq_factor is 1 in every published model.
_LOW_FREQ_FACTOR = 1.0
_ROPE_TOLERANCE = 1e-5


def family(name: Any, label: str) -> Family:
    """The family of an architecture's name; UnsupportedError for an unknown one, by name."""
    if name not in FAMILIES:
        raise UnsupportedError(f"{label}: architecture {name!r} is not supported; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def hf_config(config: Mapping[str, Any], label: str, **tokens: Any) -> ModelConfig:
    """ModelConfig of a config.json. tokens: bos_id, eos_ids, add_bos and generation, which other files decide."""
    kin = family(config.get("model_type"), label)
    _check_fixed(config, HF_FIXED, label)
    values = {**kin.defaults, **{ours: config.get(theirs) for ours, theirs in HF_KEYS.items() if config.get(theirs)}}
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    values.pop("sliding_window", None)
    return _build(
        kin,
        values,
        label,
        rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        rope_scaling=_hf_rope_scaling(rope, label),
        sliding_window=_hf_window(kin, config, label),
        **tokens,
    )


def gguf_config(fields: Mapping[str, Any], rope_factors: Any, label: str, **tokens: Any) -> ModelConfig:
    """ModelConfig of a GGUF's fields. rope_factors: the data of `rope_freqs.weight`, or None."""
    arch = fields.get("general.architecture")
    kin = family(arch, label)
    own = {key.removeprefix(f"{arch}."): value for key, value in fields.items() if key.startswith(f"{arch}.")}
    _check_fixed(own, GGUF_FIXED, label)
    values = {ours: own[theirs] for ours, theirs in GGUF_KEYS.items() if own.get(theirs)}
    theta = _shortest(own.get("rope.freq_base", 10000.0))
    built = _build(
        kin,
        values,
        label,
        rope_theta=theta,
        rope_scaling=_gguf_rope_scaling(own, label),
        sliding_window=own.get("attention.sliding_window") or None,
        **tokens,
    )
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(key, built.head_dim) != built.head_dim:
            raise UnsupportedError(f"{label}: {key} is {own[key]}, expected the head dimension {built.head_dim}")
    if rope_factors is None:
        return built
    return replace(built, rope_scaling=llama3_scaling(np.asarray(rope_factors), built, label))


def check_tensors(found: Mapping[str, tuple[int, ...]], config: ModelConfig, tied: bool, label: str) -> None:
    """Refuse a checkpoint whose tensors are not those of its configuration."""
    kin = FAMILIES[config.architecture]
    shapes, required = {}, set()
    for name, shape, needed in config.tensors():
        part = name.split(".", 3)[-1]
        if part in _NORMS and part not in kin.required:
            continue  # a norm that the family does not know would be applied in a place of our own choosing
        shapes[name] = shape
        if (needed and not (tied and name == HEAD)) or part in kin.required:
            required.add(name)
    for name in sorted(required - found.keys()):
        raise SourceError(f"{label}: tensor {name} is missing, expected {list(shapes[name])}; is a shard absent?")
    for name, shape in found.items():
        if name not in shapes:
            raise UnsupportedError(f"{label}: tensor {name} has no place in a {kin.name} model as rkf knows it")
        if shape != shapes[name]:
            raise SourceError(
                f"{label}: tensor {name}: expected shape {list(shapes[name])} by the configuration, got {list(shape)}"
            )


def llama3_scaling(factors: np.ndarray, config: ModelConfig, label: str) -> RopeScaling:
    """The scaling whose frequency divisors are `factors: f32[head_dim / 2]`; SourceError if there is none.

    Inverts `_compute_llama3_parameters` (transformers/modeling_rope_utils.py). Between the two thresholds the
    divisor d satisfies (1/d - 1/factor) / (1 - 1/factor) = (context / wavelength - low) / (high - low), a line over
    1 / wavelength. It has two coefficients for three unknowns, so any low describes it: 1 is taken.
    """
    factors = factors.astype(np.float64)
    inverse_wavelength = _frequencies(config) / (2 * np.pi)
    factor = float(factors.max())
    between = (factors > 1) & (factors < factor)
    candidates = [RopeScaling("llama3", factor, _LOW_FREQ_FACTOR, 4.0, 8192)]
    if between.sum() >= 2:
        smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        slope, intercept = np.polyfit(inverse_wavelength[between], smooth, 1)
        span = -_LOW_FREQ_FACTOR / intercept
        high = float(np.round(_LOW_FREQ_FACTOR + span, 3))
        candidates.append(RopeScaling("llama3", factor, _LOW_FREQ_FACTOR, high, round(float(slope * span))))
    for scaling in candidates:
        if np.allclose(llama3_divisors(scaling, config), factors, rtol=_ROPE_TOLERANCE):
            return scaling
    raise SourceError(f"{label}: rope_freqs.weight fits no llama3 rope scaling")


def llama3_divisors(scaling: RopeScaling, config: ModelConfig) -> np.ndarray:
    """What each rope frequency is divided by, `f64[head_dim / 2]` (the content of a GGUF's rope_freqs.weight)."""
    if scaling.low_freq_factor is None or scaling.high_freq_factor is None or scaling.original_context is None:
        raise SourceError(f"rope scaling llama3 lacks a factor: {scaling}")
    turns = scaling.original_context * _frequencies(config) / (2 * np.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return 1 / ((1 - np.clip(smooth, 0, 1)) / scaling.factor + np.clip(smooth, 0, 1))


def _frequencies(config: ModelConfig) -> np.ndarray:
    return config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)


def _build(kin: Family, values: dict[str, Any], label: str, **rest: Any) -> ModelConfig:
    for key in ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "context_length"):
        if not _is_count(values.get(key)):
            raise SourceError(f"{label}: {key}: expected a positive number, got {values.get(key)!r}")
    values.setdefault("kv_heads", values["heads"])
    values.setdefault("head_dim", values["hidden_size"] // values["heads"])
    values["norm_epsilon"] = _shortest(values.get("norm_epsilon", 1e-6))
    if not _is_count(values["kv_heads"]) or values["heads"] % values["kv_heads"]:
        raise SourceError(f"{label}: {values['kv_heads']} key/value heads don't divide {values['heads']} heads")
    if not _is_count(values["head_dim"]) or values["head_dim"] % 2:
        raise SourceError(f"{label}: head dimension {values['head_dim']!r} is not even")
    return ModelConfig(architecture=kin.name, **values, **rest)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_fixed(found: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], label: str) -> None:
    for key, allowed in fixed.items():
        if found.get(key) not in allowed:
            raise UnsupportedError(f"{label}: {key} = {found[key]!r} is not supported (only {allowed[0]!r})")


def _hf_rope_scaling(rope: Mapping[str, Any], label: str) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", _rope_number(rope, "factor", label))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            _rope_number(rope, "factor", label),
            _rope_number(rope, "low_freq_factor", label),
            _rope_number(rope, "high_freq_factor", label),
            int(_rope_number(rope, "original_max_position_embeddings", label)),
        )
    raise UnsupportedError(f"{label}: rope scaling {kind!r} is not supported; known: linear, llama3")


def _gguf_rope_scaling(own: Mapping[str, Any], label: str) -> RopeScaling | None:
    kind = own.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", _shortest(_rope_number(own, "rope.scaling.factor", label)))
    raise UnsupportedError(f"{label}: rope scaling {kind!r} is not supported; known: linear, llama3")


def _rope_number(rope: Mapping[str, Any], key: str, label: str) -> float:
    value = rope.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise SourceError(f"{label}: rope scaling: {key}: expected a positive number, got {value!r}")
    return float(value)


def _hf_window(kin: Family, config: Mapping[str, Any], label: str) -> int | None:
    window = config.get("sliding_window", kin.defaults.get("sliding_window"))
    if window is None or config.get("use_sliding_window") is False:
        return None
    kinds = config.get("layer_types") or _window_kinds(config)
    if set(kinds) == {"full_attention"}:
        return None
    if set(kinds) == {"sliding_attention"}:
        return int(window)
    raise UnsupportedError(f"{label}: a sliding window in some layers only is not supported")


def _window_kinds(config: Mapping[str, Any]) -> list[str]:
    """What transformers makes of a config.json without layer_types: Qwen's first max_window_layers see everything."""
    full = config.get("max_window_layers", 28) if "use_sliding_window" in config else 0
    layers = config["num_hidden_layers"]
    return ["full_attention"] * min(full, layers) + ["sliding_attention"] * max(layers - full, 0)


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to the same f32: what the model's author wrote before it became f32."""
    return float(str(np.float32(value)))
