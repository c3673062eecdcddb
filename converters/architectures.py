"""Configuration keys of foreign checkpoints -> ModelConfig, and the tensors that a configuration implies. Tables.

Every quirk of a family ends here: what ModelConfig cannot say is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rkf.converters.names import HEAD
from rkf.errors import CorruptError, SourceError, UnsupportedError
from rkf.format.fields import REMEDY
from rkf.model.first_form import ModelConfig, RopeScaling


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
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnsupportedError(f"{label}: architecture {name!r} is not supported; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def hf_config(config: Mapping[str, Any], label: str, **tokens: Any) -> ModelConfig:
    """ModelConfig of a config.json. tokens: bos_id, eos_ids, add_bos and generation, which other files decide."""
    kin = family(config.get("model_type"), label)
    _check_fixed(config, HF_FIXED, label)
    set_values = {key: value for key, value in config.items() if value is not None}
    full = {**kin.defaults, **set_values}
    rope = _hf_rope(config, label)
    return _build(
        kin,
        {ours: full.get(theirs) for ours, theirs in HF_KEYS.items()},
        label,
        rope_theta=rope.get("rope_theta", full.get("rope_theta", 10000.0)),
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
    values = {ours: own.get(theirs) for ours, theirs in GGUF_KEYS.items()}
    built = _build(
        kin,
        values | {"norm_epsilon": _shortest(values["norm_epsilon"])},
        label,
        rope_theta=_shortest(own.get("rope.freq_base", 10000.0)),
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
    known = set()
    for name, shape, needed in config.tensors():  # lazily: a forged number of layers ends at the first that is missing
        part = name.split(".", 3)[-1]
        if part in _NORMS and part not in kin.required:
            continue  # a norm that the family does not know would be applied in a place of our own choosing
        if name not in found:
            if (needed and not (tied and name == HEAD)) or part in kin.required:
                raise SourceError(f"{label}: tensor {name} is missing, expected {list(shape)}; is a shard absent?")
            continue
        known.add(name)
        if found[name] != shape:
            raise SourceError(
                f"{label}: tensor {name}: expected shape {list(shape)} by the configuration, got {list(found[name])}"
            )
    for name in sorted(found.keys() - known):
        raise UnsupportedError(f"{label}: tensor {name} has no place in a {kin.name} model as rkf knows it")


def llama3_scaling(factors: np.ndarray, config: ModelConfig, label: str) -> RopeScaling:
    """The scaling whose frequency divisors are `factors: f32[head_dim / 2]`; SourceError if there is none.

    Inverts `_compute_llama3_parameters` (transformers/modeling_rope_utils.py). Between the two thresholds the
    divisor d satisfies (1/d - 1/factor) / (1 - 1/factor) = (context / wavelength - low) / (high - low), a line over
    1 / wavelength. It has two coefficients for three unknowns, so any low describes it: 1 is taken.
    """
    factors = factors.astype(np.float64).reshape(-1)
    if factors.size != config.head_dim // 2 or not np.all(np.isfinite(factors) & (factors >= 1)):
        raise SourceError(f"{label}: rope_freqs.weight: expected {config.head_dim // 2} divisors of at least 1")
    inverse_wavelength = _frequencies(config) / (2 * np.pi)
    factor = float(factors.max())
    between = (factors > 1) & (factors < factor)
    candidates = [RopeScaling("llama3", factor, _LOW_FREQ_FACTOR, 4.0, 8192)]
    if between.sum() >= 2:
        smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        slope, intercept = np.polyfit(inverse_wavelength[between], smooth, 1)
        if slope > 0 > intercept:
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


def _build(kin: Family, found: Mapping[str, Any], label: str, **rest: Any) -> ModelConfig:
    """ModelConfig of what was found, with the defaults of every family; refused if a reader would refuse it."""
    heads, hidden = found["heads"], found["hidden_size"]
    whole = isinstance(heads, int) and isinstance(hidden, int) and heads > 0
    shared = {"kv_heads": heads, "head_dim": hidden // heads if whole else None, "norm_epsilon": 1e-6}
    values = shared | {key: value for key, value in found.items() if value is not None}
    numbers: dict[str, Any] = {key: values.get(key) for key in HF_KEYS}
    built = ModelConfig(architecture=kin.name, **numbers, **rest)
    try:
        ModelConfig.from_metadata(built.to_metadata())
    except CorruptError as error:
        problem = str(error).removeprefix("metadata.model, ").removesuffix(f"; {REMEDY}")
        raise SourceError(f"{label}: its configuration can't be used: {problem}") from error
    return built


def _check_fixed(found: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], label: str) -> None:
    for key, allowed in fixed.items():
        if found.get(key) not in allowed:
            raise UnsupportedError(f"{label}: {key} = {found[key]!r} is not supported (only {allowed[0]!r})")


def _hf_rope(config: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Rope's keys, from where transformers 5 and the versions before it put them."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        part = config.get(key) or {}
        if not isinstance(part, Mapping):
            raise SourceError(f"{label}: {key}: expected an object, got {part!r}")
        rope |= part
    return rope


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


def _hf_window(kin: Family, config: Mapping[str, Any], label: str) -> Any:
    window = config.get("sliding_window", kin.defaults.get("sliding_window"))
    if window is None or config.get("use_sliding_window") is False:
        return None
    layer_types = config.get("layer_types")
    kinds = set(map(str, layer_types)) if isinstance(layer_types, list) else set()
    if not kinds and "use_sliding_window" in config:
        # Qwen before layer_types: the first max_window_layers layers see everything.
        full = config.get("max_window_layers", 28)
        kinds = {"full_attention"} if full >= config.get("num_hidden_layers", 0) else {"mixed"} if full else set()
    if kinds == {"full_attention"}:
        return None
    if kinds <= {"sliding_attention"}:
        return window
    raise UnsupportedError(f"{label}: a sliding window in some layers only is not supported")


def _shortest(value: Any) -> Any:
    """The shortest decimal that rounds to the same f32: what the model's author wrote before it became f32."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
