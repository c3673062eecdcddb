"""The fields of a GGUF <-> a config.json, for the part that all families share. Knows no family."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from rkf.converters.families import rope_scaling
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.family import Family, GgufFields, GgufModel
from rkf.converters.families.gguf_experts import INNER, USED
from rkf.converters.families.gguf_rope import FACTORS, rope_config, shortest
from rkf.errors import SourceError, UnsupportedError

C = TypeVar("C", bound=DecoderKeys)
RMS_EPSILON, LAYER_NORM_EPSILON = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
# config.json key -> GGUF key, after "<architecture>.".
KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": RMS_EPSILON,
}
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


def head_size(model: GgufModel) -> int:
    """The width of a head."""
    given, heads, width = (
        model.own.get(key) for key in ("attention.key_length", "attention.head_count", "embedding_length")
    )
    size = given or (width // heads if isinstance(width, int) and isinstance(heads, int) and heads > 0 else None)
    if not isinstance(size, int) or size < 1:
        raise SourceError("attention.head_count, embedding_length: expected positive integers that give a head's size")
    return size


def whole_rope(model: GgufModel) -> dict[str, Any]:
    """The keys of the rope of a family that always rotates whole heads."""
    size = head_size(model)
    only_whole_heads(model.own, size)
    return rope_scaling.spelt(rope_config(model, size))


def partial_rope(model: GgufModel) -> dict[str, Any]:
    """The keys of a rope that may rotate the first part of a head."""
    size = head_size(model)
    part = model.own.get("rope.dimension_count", size) / size
    return rope_scaling.spelt(rope_config(model, size) | {"partial_rotary_factor": part})


def config_of(family: Family[Any], model: GgufModel) -> dict[str, Any]:
    """A config.json in transformers' form."""
    _check(model.own)
    found = {ours: shortest(model.own[theirs]) for ours, theirs in KEYS.items() if theirs in model.own}
    own = family.gguf.to_config(model)
    for key, value in found.items():
        if isinstance(value, np.ndarray) and key not in own:
            raise UnsupportedError(
                f"field {KEYS[key]}: layers of different sizes are not supported in this architecture"
            )
    if "intermediate_size" not in {**found, **own}:  # some mixtures have no dense layer
        raise SourceError(f"field {KEYS['intermediate_size']} is missing")
    return {
        "architectures": [family.class_name],
        "model_type": family.name,
        **found,
        **_heads(model, found, own),
        "tie_word_embeddings": "output.weight" not in model.tensors,
        **own,
    }


def _check(own: Mapping[str, Any]) -> None:
    """Refuse fields without which there is no model, and those that every architecture of llama.cpp reads."""
    for key in _REQUIRED:
        if KEYS[key] not in own:
            raise SourceError(f"field {KEYS[key]} is missing")
        if not isinstance(own[KEYS[key]], int):
            raise UnsupportedError(f"field {KEYS[key]}: expected an integer, got {reprlib.repr(own[KEYS[key]])}")
    if RMS_EPSILON not in own and LAYER_NORM_EPSILON not in own:
        raise SourceError(f"field {RMS_EPSILON} is missing")
    for key in (USED, INNER):
        if isinstance(own.get(key), np.ndarray):
            raise UnsupportedError(f"field {key}: layers with different experts are not supported")
    if not own.get("attention.causal", True):
        raise UnsupportedError("attention.causal is false: attention to later tokens is not supported")


def _heads(model: GgufModel, found: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of heads; none for a model without attention, which has 0 of them. own: the family's own keys."""
    if found["num_attention_heads"] == 0:
        return {}
    size = head_size(model)
    value_size = model.own.get("attention.value_length", size)
    if value_size != size and "v_head_dim" not in own:
        raise UnsupportedError(f"attention.value_length is {value_size}, expected {size} as for keys")
    return {
        "num_key_value_heads": found.get("num_key_value_heads", found["num_attention_heads"]),
        "head_dim": size,
    }


def fields_of(family: Family[C], config: C) -> GgufFields:
    """The fields of a GGUF, without the architecture's prefix and without the tokenizer's.

    Raises UnsupportedError for what a GGUF of the family cannot say.
    """
    activation = family.gguf.activation
    config.refuse(config.hidden_act != activation, "hidden_act", f"{activation}, which llama.cpp computes")
    own = family.gguf.to_fields(config)
    if FACTORS in own.extra and not family.gguf.factors:
        raise UnsupportedError(f"rope scaling 'llama3' is not supported: llama.cpp has no tensor {FACTORS} here")
    common: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in KEYS.items()}
    common |= {
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
    }
    return GgufFields({key: value for key, value in (common | dict(own.own)).items() if value is not None}, own.extra)


def layer_norm_fields(config: DecoderKeys) -> dict[str, Any]:
    """The field of the epsilon in a family of LayerNorm, in place of the one of RMS norms."""
    return {RMS_EPSILON: None, LAYER_NORM_EPSILON: config.rms_norm_eps}


def only_usual_heads(config: DecoderKeys) -> None:
    """Refuse heads whose total width is not hidden_size, for an architecture in which llama.cpp assumes it."""
    if config.head_size * config.num_attention_heads != config.hidden_size:
        raise UnsupportedError("head_dim: a GGUF cannot store heads whose total width differs from hidden_size")


def only_whole_heads(own: Mapping[str, Any], size: int) -> None:
    """Refuse a rope that rotates part of a head, for a family that always rotates whole heads."""
    turned = own.get("rope.dimension_count", size)
    if turned != size:
        raise UnsupportedError(f"rope.dimension_count is {turned}, expected the head dimension {size}")
