"""gemma4_text in GGUF. Source: Gemma4Model in llama.cpp's conversion/gemma.py, and src/models/gemma4.cpp.

Layers with a window have fields of their own (..._swa). Numbers that differ by layer are arrays. Full layers turn whole
heads there, with 1e30 as the divisor of each frequency that is 0 here.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from rkf.converters.families.expert_layout import fused_stacks, renamed
from rkf.converters.families.family import GgufFields, GgufForm, GgufModel
from rkf.converters.families.gemma4_keys import Gemma4Keys
from rkf.converters.families.gguf_config import head_size, only_whole_heads
from rkf.converters.families.gguf_experts import INNER, expert_config, expert_fields
from rkf.converters.families.gguf_rope import FACTORS, rope_config, shortest
from rkf.converters.families.keys import FULL, SLIDING
from rkf.converters.families.layout import Layout
from rkf.converters.families.windows import layer_windows, window_fields
from rkf.errors import SourceError, UnsupportedError

_SOFTCAP, _LOCAL_THETA = 30.0, 10000.0  # llama.cpp assumes them where a file has no field
_STILL = 1e30  # the divisor of a frequency that is 0
_INNER, _KV_HEADS, _SHARED = "feed_forward_length", "attention.head_count_kv", "attention.shared_kv_layers"
_LAYER_INPUT = "embedding_length_per_layer_input"
_KEYS_OR_VALUES = re.compile(r"blk\.(\d+)\.attn_(k|v|k_norm)\.\w+")
# The program's names of tensors whose names in a GGUF follow from another module's, or have an ending.
_NAMES = {
    "router.scale": "router.proj.scale",
    "router.per_expert_scale": "experts.down_proj.scale",
    "layer_scalar": "layer_scalar.weight",
}


def _to_config(model: GgufModel) -> dict[str, Any]:
    own = model.own
    wide, narrow = head_size(model), own.get("attention.key_length_swa")
    if not isinstance(narrow, int) or own.get("attention.value_length_swa") != narrow:
        raise SourceError("attention.key_length_swa, attention.value_length_swa: expected the same positive integer")
    windows = layer_windows(own, period=6)
    kinds, shared = windows["layer_types"], own.get(_SHARED, 0)
    inner, kv_heads = (_by_layer(own, key, len(kinds)) for key in (_INNER, _KV_HEADS))
    full = kinds.index(FULL) if FULL in kinds else 0
    config = {
        **windows,
        "head_dim": narrow,
        "global_head_dim": wide,
        "per_layer_config": {
            str(layer): {"head_dim": wide if kind == FULL else narrow, "num_key_value_heads": heads}
            for layer, (kind, heads) in enumerate(zip(kinds, kv_heads, strict=True))
        },
        "num_key_value_heads": kv_heads[kinds.index(SLIDING) if SLIDING in kinds else 0],
        "num_global_key_value_heads": kv_heads[full],
        "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in model.tensors,
        "num_kv_shared_layers": shared,
        "intermediate_size": inner[0],
        "use_double_wide_mlp": inner[-1] == 2 * inner[0],
        "hidden_size_per_layer_input": own.get(_LAYER_INPUT, 0),
        "vocab_size_per_layer_input": own.get("vocab_size"),
        "final_logit_softcapping": shortest(own.get("final_logit_softcapping", _SOFTCAP)) or None,
        "rope_parameters": {FULL: _full_rope(model, wide), SLIDING: _local_rope(model, narrow)},
    }
    if own.get("expert_count"):
        config |= {"enable_moe_block": True, "moe_intermediate_size": own.get(INNER)}
        config |= expert_config(own, used="top_k_experts")
    first = len(kinds) - shared
    if inner != [inner[0] * (2 if config["use_double_wide_mlp"] and n >= first else 1) for n in range(len(kinds))]:
        raise UnsupportedError(f"{_INNER}: {inner} is not supported; expected one width, twice it in sharing layers")
    if not _shares_as_here(kinds, first):
        raise UnsupportedError(f"{_SHARED}: {shared} is not supported; expected {_EXPECTED}")
    return config


def _by_layer(own: Any, key: str, layers: int) -> list[int]:
    """A field with one number, or one for each layer."""
    found = np.asarray(own.get(key, 0))
    if found.shape not in ((), (layers,)) or not np.issubdtype(found.dtype, np.integer):
        raise SourceError(f"{key}: expected an integer, or {layers} of them")
    return [int(each) for each in np.broadcast_to(found, layers)]


def _full_rope(model: GgufModel, size: int) -> dict[str, Any]:
    """The rope of layers without a window."""
    factors = model.extra.get(FACTORS)
    if factors is None:
        raise SourceError(f"tensor {FACTORS} is missing, expected [{size // 2}]")
    turned = int(np.count_nonzero(factors == 1))
    if factors.shape != (size // 2,) or np.any(factors[:turned] != 1) or np.any(factors[turned:] < _STILL):
        raise UnsupportedError(f"{FACTORS}: expected {size // 2} divisors: ones, then {_STILL:g}")
    only_whole_heads(model.own, size)
    plain = rope_config(GgufModel(model.own, model.tensors, {}), size)
    if plain["rope_type"] != "default":
        raise UnsupportedError(f"rope scaling {plain['rope_type']!r} is not supported beside tensor {FACTORS}")
    return plain | {"rope_type": "proportional", "partial_rotary_factor": 2 * turned / size}


def _local_rope(model: GgufModel, size: int) -> dict[str, Any]:
    """The rope of layers with a window."""
    if model.own.get("rope.dimension_count_swa", size) != size:
        raise UnsupportedError(f"rope.dimension_count_swa: expected the head dimension {size}")
    return {"rope_type": "default", "rope_theta": shortest(model.own.get("rope.freq_base_swa", _LOCAL_THETA))}


_EXPECTED = "a layer with a window and then a full one before the layers that share, as llama.cpp assumes"


def _shares_as_here(kinds: Any, first: int) -> bool:
    """Whether llama.cpp's rule gives the layers from `first` the keys and values of the same layers as the reference.

    It takes the last layer before them for full layers, and the one before that for those with a window.
    """
    return first >= len(kinds) or tuple(kinds[first - 2 : first]) == (SLIDING, FULL)


def _to_fields(config: Gemma4Keys) -> GgufFields:
    config.refuse(config.attention_bias, "attention_bias", "false: llama.cpp has no biases here")
    config.refuse(not _shares_as_here(config.kinds, config.first_shared), "num_kv_shared_layers", _EXPECTED)
    each, rows = config.hidden_size_per_layer_input, config.vocab_size_per_layer_input
    config.refuse(bool(each) and rows != config.vocab_size, "vocab_size_per_layer_input", "vocab_size")
    config.refuse(SLIDING not in config.kinds, "layer_types", "a layer with a window, which llama.cpp needs")
    layers = range(config.num_hidden_layers)
    sizes = {kind: config.heads(layer)[0] for layer, kind in zip(layers, config.kinds, strict=True)}
    kv_heads = [config.heads(layer)[1] for layer in layers]
    wide = [config.use_double_wide_mlp and layer >= config.first_shared for layer in layers]
    ropes = {kind: config.rope(kind) for kind in sizes}
    if ropes[SLIDING]["rope_type"] != "default" or ropes[FULL].get("factor", 1) != 1:
        raise UnsupportedError("rope_parameters: a GGUF of this family cannot store a scaling")
    turned = int(sizes[FULL] * ropes[FULL]["partial_rotary_factor"] // 2)
    own = {
        **window_fields(config),
        "attention.key_length": sizes[FULL],
        "attention.value_length": sizes[FULL],
        "attention.key_length_swa": sizes[SLIDING],
        "attention.value_length_swa": sizes[SLIDING],
        _KV_HEADS: kv_heads if len(set(kv_heads)) > 1 else kv_heads[0],
        _SHARED: config.num_kv_shared_layers,
        _INNER: [config.intermediate_size * (1 + double) for double in wide] if any(wide) else config.intermediate_size,
        _LAYER_INPUT: each,
        "final_logit_softcapping": config.final_logit_softcapping or 0.0,
        "rope.dimension_count": sizes[FULL],
        "rope.dimension_count_swa": sizes[SLIDING],
        "rope.freq_base": float(ropes[FULL]["rope_theta"]),
        "rope.freq_base_swa": float(ropes[SLIDING]["rope_theta"]),
    }
    if config.enable_moe_block:
        own |= expert_fields(config.num_experts or 0, config.top_k_experts or 0, config.moe_intermediate_size)
    divisors = np.where(np.arange(sizes[FULL] // 2) < turned, 1, _STILL).astype(np.float32)
    return GgufFields(own, {FACTORS: divisors})


def _layout(config: Gemma4Keys) -> Layout:
    """Experts are fused stacks, and their scales are named after the matrices."""
    rest = renamed(_NAMES)
    if not config.enable_moe_block:
        return rest
    stacks = ("experts.gate_up_proj.weight", "experts.down_proj.weight")
    return fused_stacks(config.num_experts or 0, config.moe_intermediate_size or 0, *stacks, rest=rest)


def _unused(config: Gemma4Keys, name: str) -> bool:
    """llama.cpp reads no keys and values of layers that share those of another, though its converter writes them."""
    match = _KEYS_OR_VALUES.fullmatch(name)
    return match is not None and int(match[1]) >= config.first_shared


GGUF = GgufForm("gemma4", _to_config, _to_fields, _layout, activation="gelu_tanh", unused=_unused, factors=True)
