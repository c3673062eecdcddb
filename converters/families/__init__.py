"""The families of models that can be converted, one file each. Family names appear only in this folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rkf.converters.families import (
    apertus,
    arcee,
    cohere2,
    deepseek_v3,
    ernie4_5,
    ernie4_5_moe,
    exaone4,
    gemma2,
    gemma3,
    gemma4,
    gemma4_unified,
    glm4,
    glm4_moe,
    glm4_moe_lite,
    gpt_neox,
    gpt_oss,
    granite,
    granitemoe,
    granitemoehybrid,
    lfm2,
    lfm2_moe,
    llama,
    llama4,
    mamba2,
    ministral,
    ministral3,
    mistral,
    mixtral,
    nemotron,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from rkf.converters.families.family import Family
from rkf.errors import UnsupportedError

_MODULES = (
    *(llama, mistral, ministral, ministral3, qwen2, qwen3, qwen3_moe, phi3, olmo2, olmo3, gemma2, gemma3, smollm3),
    *(granite, glm4, exaone4, cohere2, seed_oss, ernie4_5, starcoder2, stablelm, nemotron, gpt_neox),
    *(mixtral, qwen2_moe, olmoe, gpt_oss, granitemoe, ernie4_5_moe, qwen3_5, qwen3_5_moe, lfm2, lfm2_moe),
    *(gemma4, gemma4_unified, glm4_moe, glm4_moe_lite, llama4, apertus, arcee, deepseek_v3),
    *(mamba2, granitemoehybrid),
)
FAMILIES: Mapping[str, Family[Any]] = {module.FAMILY.name: module.FAMILY for module in _MODULES}
_WRAPPERS = tuple(dict.fromkeys(family.wrapper.model_type for family in FAMILIES.values() if family.wrapper))


def family_of(config: Mapping[str, Any]) -> tuple[Family[Any], dict[str, Any], bool]:
    """The family of a config.json, the decoder's own configuration, and whether it was inside another model's.

    Raises UnsupportedError for an unknown model_type.
    """
    name = config.get("model_type")
    if isinstance(name, str) and name in _WRAPPERS:
        return _wrapped(name, config)
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnsupportedError(f"architecture {name!r} is not supported; known: {', '.join((*FAMILIES, *_WRAPPERS))}")
    # As AutoConfig of the reference: the key belongs to the other family, and published models have it under this name.
    family = ministral.FAMILY if name == mistral.FAMILY.name and "layer_types" in config else FAMILIES[name]
    return family, dict(config), False


def _wrapped(name: str, config: Mapping[str, Any]) -> tuple[Family[Any], dict[str, Any], bool]:
    """The family inside a model of several parts: the one that text_config names, by default the first."""
    inside = {each.name: each for each in FAMILIES.values() if each.wrapper and each.wrapper.model_type == name}
    text = config.get("text_config")
    kind = text.get("model_type") if isinstance(text, dict) else None
    family = inside.get(kind) if kind is not None else next(iter(inside.values()))
    if family is None or family.wrapper is None:
        raise UnsupportedError(f"text_config: architecture {kind!r} is not supported; known: {', '.join(inside)}")
    return family, family.wrapper.text(config, family.name), True


def family_of_gguf(architecture: Any, own: Mapping[str, Any]) -> Family[Any]:
    """The family of a GGUF's architecture and its own fields; UnsupportedError for an unknown one."""
    known = {family.gguf.architecture: None for family in FAMILIES.values()}
    if architecture not in known:
        raise UnsupportedError(f"architecture {architecture!r} is not supported; known: {', '.join(known)}")
    for family in FAMILIES.values():
        if family.gguf.architecture == architecture and family.gguf.claims(own):
            return family
    scored = f"expert_count {own.get('expert_count')} and expert_gating_func {own.get('expert_gating_func')}"
    raise UnsupportedError(f"architecture {architecture!r} with {scored} is not supported")
