"""The fields of a GGUF that every mixture of experts has. Knows no family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COUNT, _USED, INNER = "expert_count", "expert_used_count", "expert_feed_forward_length"
SHARED_INNER = "expert_shared_feed_forward_length"


def expert_config(
    own: Mapping[str, Any], count: str = "num_experts", used: str = "num_experts_per_tok"
) -> dict[str, Any]:
    """Keys of config.json, with the names they have there."""
    return {count: own.get(_COUNT), used: own.get(_USED)}


def expert_fields(count: int, used: int, inner: int | None = None) -> dict[str, Any]:
    """The fields. inner: the width of the experts, if it is not that of dense layers."""
    return {_COUNT: count, _USED: used, INNER: inner}
