"""The fields of a GGUF that every mixture of experts has. Knows no family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rkf.errors import UnsupportedError

COUNT, USED, GROUPS = "expert_count", "expert_used_count", "expert_group_count"
FUNCTION, SIGMOID = "expert_gating_func", 2  # how experts are scored, and llama.cpp's number for one way
INNER = "expert_feed_forward_length"
SHARED_INNER = "expert_shared_feed_forward_length"


def expert_config(
    own: Mapping[str, Any], count: str = "num_experts", used: str = "num_experts_per_tok"
) -> dict[str, Any]:
    """Keys of config.json, with the names they have there, for experts in one group."""
    if own.get(GROUPS, 1) > 1:
        raise UnsupportedError(f"{GROUPS}: {own[GROUPS]} is not supported in this architecture; expected 1")
    return {count: own.get(COUNT), used: own.get(USED)}


def inner_width(own: Mapping[str, Any]) -> int:
    """The width of an expert, in an architecture where llama.cpp has a default: the dense width divided by the experts
    of a token.
    """
    return own.get(INNER) or own.get("feed_forward_length", 0) // (own.get(USED) or 1)


def expert_fields(count: int, used: int, inner: int | None = None) -> dict[str, Any]:
    """The fields. inner: the width of the experts, if it is not that of dense layers."""
    return {COUNT: count, USED: used, INNER: inner}


def is_by_sigmoid(own: Mapping[str, Any]) -> bool:
    """Whether a file of an architecture with several ways to score experts has this one."""
    return own.get(FUNCTION) == SIGMOID


def only_by_sigmoid(own: Mapping[str, Any]) -> None:
    """Refuse another way to score experts, for an architecture with this one by default."""
    if own.get(FUNCTION, SIGMOID) != SIGMOID:
        raise UnsupportedError(f"{FUNCTION}: {own[FUNCTION]} is not supported in this architecture; expected {SIGMOID}")
