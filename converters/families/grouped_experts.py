"""The mixture that DeepSeek V3 began: sigmoid scores with a correction bias, groups of experts, shared experts.

Knows no family. The first layers are dense. Layers after the last are for predicting several tokens at once; the
reference ignores them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rkf.converters.families.blocks import Layer, experts, gated, with_shared_expert
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.expert_layout import expert_stacks
from rkf.converters.families.gguf_experts import COUNT, FUNCTION, GROUPS, INNER, SIGMOID, USED, expert_fields
from rkf.converters.families.gguf_rope import shortest
from rkf.converters.families.keys import count, flag, number, size
from rkf.converters.families.layout import Layout, Origin, as_named
from rkf.errors import UnsupportedError
from rkf.model.ops import Route
from rkf.model.program import layer_of

_SELECT = "mlp.gate.e_score_correction_bias"
_ADDED = 1e-20  # to the sum that the weights are divided by
_DENSE, _SHARED = "leading_dense_block_count", "expert_shared_count"
_SCALE, _NORMALISE = "expert_weights_scale", "expert_weights_norm"


@dataclass(frozen=True, kw_only=True)
class GroupedExperts(DecoderKeys):
    moe_intermediate_size: int = size(2048)
    n_routed_experts: int = size(256, name="num_local_experts", aliases=("n_routed_experts",), most=1 << 16)
    num_experts_per_tok: int = size(8)
    n_shared_experts: int = size(1)
    n_group: int = size(8)
    topk_group: int = size(4)
    norm_topk_prob: bool = flag(True)
    routed_scaling_factor: float = number(2.5)
    first_k_dense_replace: int = count(3)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return layer >= self.first_k_dense_replace


def feed_forward(config: GroupedExperts, layer: int) -> Layer:
    """The feed-forward part of a layer: dense, or experts beside shared ones."""
    if not config.is_sparse(layer):
        return gated(config)
    grouped = config.n_group > 1
    route = Route(
        src="h",
        dst="r",
        weight="mlp.gate.weight",
        select=_SELECT,
        experts=config.n_routed_experts,
        count=config.num_experts_per_tok,
        score="sigmoid",
        groups=config.n_group if grouped else None,
        top_groups=config.topk_group if grouped else None,
        normalise=config.norm_topk_prob,
        add=_ADDED if config.norm_topk_prob else 0.0,
        scale=config.routed_scaling_factor,
    )
    chosen = experts(config, route, config.moe_intermediate_size)
    inner = config.n_shared_experts * config.moe_intermediate_size
    return with_shared_expert(config, chosen, inner, "mlp.shared_experts")


def expert_layout(config: GroupedExperts, rest: Layout = as_named) -> Layout:
    """Experts one by one or in stacks. rest: the layout of other tensors."""
    return expert_stacks(config.n_routed_experts, config.moe_intermediate_size, rest=rest)


def gguf_expert_layout(rest: Layout = as_named) -> Layout:
    """gguf's tables have the name of the correction bias without its last word."""

    def layout(name: str) -> tuple[Origin, ...]:
        return as_named("mlp.gate.e_score_correction.bias") if name == _SELECT else rest(name)

    return layout


def is_beyond(config: GroupedExperts, name: str) -> bool:
    """Whether a tensor is of a layer after the last."""
    layer = layer_of(name)
    return layer is not None and layer >= config.num_hidden_layers


def grouped_config(own: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.json from the fields of a GGUF."""
    return {
        "n_routed_experts": own.get(COUNT),
        "num_experts_per_tok": own.get(USED),
        "moe_intermediate_size": own.get(INNER),
        "n_shared_experts": own.get(_SHARED),
        "n_group": own.get(GROUPS, 1),
        "topk_group": own.get("expert_group_used_count", 1),
        "norm_topk_prob": own.get(_NORMALISE, False),
        "routed_scaling_factor": shortest(own.get(_SCALE) or 1.0),
        "first_k_dense_replace": own.get(_DENSE, 0),
    }


def grouped_fields(config: GroupedExperts) -> dict[str, Any]:
    """The fields of a GGUF. Raises UnsupportedError for a dense layer behind one with experts."""
    sparse = [config.is_sparse(layer) for layer in range(config.num_hidden_layers)]
    if sparse != sorted(sparse):
        raise UnsupportedError("mlp_layer_types: a GGUF can store only leading dense layers")
    found: dict[str, Any] = {
        **expert_fields(config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size),
        _SHARED: config.n_shared_experts,
        _DENSE: sparse.count(False),
        FUNCTION: SIGMOID,
        _SCALE: config.routed_scaling_factor,
        _NORMALISE: config.norm_topk_prob,
    }
    if config.n_group > 1:
        found |= {GROUPS: config.n_group, "expert_group_used_count": config.topk_group}
    return found
