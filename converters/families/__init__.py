"""The families of models that can be converted, one file each. Family names appear only in this folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rkf.converters.families import gemma3, llama, mistral, olmo2, phi3, qwen2, qwen3, qwen3_moe
from rkf.converters.families.family import Family
from rkf.errors import UnsupportedError

FAMILIES: Mapping[str, Family[Any]] = {
    module.FAMILY.name: module.FAMILY for module in (llama, mistral, qwen2, qwen3, phi3, olmo2, gemma3, qwen3_moe)
}
_WRAPPED = {family.wrapper.model_type: family for family in FAMILIES.values() if family.wrapper}


def family_of(config: Mapping[str, Any]) -> tuple[Family[Any], dict[str, Any], bool]:
    """The family of a config.json, the decoder's own configuration, and whether it was inside another model's.

    Raises UnsupportedError for an unknown model_type.
    """
    name = config.get("model_type")
    if name in _WRAPPED:
        family = _WRAPPED[name]
        return family, family.wrapper.text(config, family.name) if family.wrapper else dict(config), True
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnsupportedError(f"architecture {name!r} is not supported; known: {', '.join((*FAMILIES, *_WRAPPED))}")
    return FAMILIES[name], dict(config), False


def family_of_gguf(architecture: Any, own: Mapping[str, Any]) -> Family[Any]:
    """The family of a GGUF's architecture and its own fields; UnsupportedError for an unknown one."""
    known = {family.gguf.architecture: None for family in FAMILIES.values()}
    if architecture not in known:
        raise UnsupportedError(f"architecture {architecture!r} is not supported; known: {', '.join(known)}")
    for family in FAMILIES.values():
        if family.gguf.architecture == architecture and family.gguf.claims(own):
            return family
    raise UnsupportedError(
        f"architecture {architecture!r} with expert_count {own.get('expert_count')} is not supported"
    )
