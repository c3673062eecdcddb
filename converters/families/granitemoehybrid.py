"""granitemoehybrid: Granite 4. Layers of Mamba 2 and of attention, usually without rope; granite's multipliers.

Each layer has experts beside a shared one, or with 0 experts the shared one alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from rkf.converters.families.blocks import Layer, gated, with_shared_expert
from rkf.converters.families.expert_layout import fused_stacks, renamed
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_experts import SHARED_INNER, expert_config, expert_fields
from rkf.converters.families.granite import ROPE_SWITCH, program, scaled_attention, to_config, to_fields
from rkf.converters.families.granitemoe import GraniteMoeKeys, mixture
from rkf.converters.families.keys import FULL, LINEAR, count, flag, layer_types, limits, size, size_or_auto, word
from rkf.converters.families.layout import Layout, Origin, fused_rows
from rkf.converters.families.llama import unpermuted
from rkf.converters.families.mamba_mixer import MambaMixer, mixer_sizes
from rkf.errors import SourceError, UnsupportedError
from rkf.model.program import Program

_ROPE = "rope"  # the one value of position_embedding_type that has a meaning
_HEADS_BY_LAYER = "attention.head_count_kv"  # 0 in a layer without attention


@dataclass(frozen=True, kw_only=True)
class GraniteMoeHybridKeys(GraniteMoeKeys):
    num_local_experts: int = count(8)
    shared_intermediate_size: int = size(1024)
    position_embedding_type: str | None = word()
    layer_types: tuple[str, ...] | None = layer_types(FULL, LINEAR, name="layers_block_type", aliases=("layer_types",))
    mamba_n_heads: int = size(128)
    mamba_n_groups: int = size(1)
    mamba_d_state: int = size(256)
    mamba_d_head: int | None = size_or_auto()
    mamba_d_conv: int = size(4)
    mamba_expand: int = size(2)
    mamba_conv_bias: bool = flag(True)
    mamba_proj_bias: bool = flag(False)
    time_step_limit: tuple[float, float] = limits(0.0, inf)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.kinds) != self.num_hidden_layers:
            raise SourceError(f"layer_types: expected {self.num_hidden_layers} words, got {len(self.kinds)}")
        inner = self.mamba_expand * self.hidden_size
        if self.mixer.inner != inner:
            got = f"{self.mamba_n_heads} * {self.mixer.head_dim}"
            raise SourceError(f"mamba_d_head: expected mamba_n_heads * mamba_d_head = {inner}, got {got}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer, as a word of layer_types."""
        return self.layer_types or (LINEAR,) * self.num_hidden_layers

    @property
    def turns(self) -> bool:
        """Whether attention has rope."""
        return self.position_embedding_type == _ROPE and FULL in self.kinds

    @property
    def shared(self) -> str:
        """The name of the part that every token passes: beside experts, or alone."""
        return "mlp.shared_expert" if self.num_local_experts else "mlp"

    @property
    def mixer(self) -> MambaMixer:
        return MambaMixer(
            name="mamba",
            hidden=self.hidden_size,
            heads=self.mamba_n_heads,
            head_dim=self.mamba_d_head or self.mamba_expand * self.hidden_size // self.mamba_n_heads,
            groups=self.mamba_n_groups,
            state_dim=self.mamba_d_state,
            taps=self.mamba_d_conv,
            limits=self.time_step_limit,
            bias=self.mamba_proj_bias,
            conv_bias=self.mamba_conv_bias,
            act=self.hidden_act,
            epsilon=self.rms_norm_eps,
        )


def _program(config: GraniteMoeHybridKeys) -> Program:
    attends = {FULL: scaled_attention(config, rope=0 if config.turns else None), LINEAR: config.mixer.ops()}
    feeds = _feeds(config)
    return program(config, ((attends[kind], feeds) for kind in config.kinds), turns=config.turns)


def _feeds(config: GraniteMoeHybridKeys) -> Layer:
    if config.num_local_experts:
        return with_shared_expert(config, mixture(config), config.shared_intermediate_size, config.shared)
    return gated(config, inner=config.shared_intermediate_size)


def _layout(config: GraniteMoeHybridKeys) -> Layout:
    """Gate and up of the shared part are one matrix, gate first."""
    halves = dict.fromkeys((f"{config.shared}.gate_proj", f"{config.shared}.up_proj"), config.shared_intermediate_size)
    fused = fused_rows({"shared_mlp.input_linear": halves})
    router = {"mlp.gate.": "block_sparse_moe.router.layer."}
    others = renamed({f"{config.shared}.down_proj.": "shared_mlp.output_linear.", **router})

    def rest(name: str) -> tuple[Origin, ...]:
        return fused(name) if name.rpartition(".")[0] in halves else others(name)

    stacks = fused_stacks(
        config.num_local_experts,
        config.intermediate_size,
        gate_up="block_sparse_moe.input_linear.weight",
        down="block_sparse_moe.output_linear.weight",
        rest=rest,
    )
    return config.mixer.layout(stacks)


def _gguf_layout(config: GraniteMoeHybridKeys) -> Layout:
    return config.mixer.gguf_layout(unpermuted(config))


def _to_config(model: GgufModel) -> dict[str, Any]:
    """Without experts, the shared part is an ordinary feed-forward part there."""
    own, sizes = model.own, mixer_sizes(model.own)
    heads = np.broadcast_to(own.get(_HEADS_BY_LAYER, own["attention.head_count"]), own["block_count"])
    kinds = [FULL if each else LINEAR for each in heads]
    first = kinds.index(FULL) if FULL in kinds else 0
    count = own.get("expert_count") or 0
    return {
        **to_config(model),
        **(expert_config(own, "num_local_experts") if count else {"num_local_experts": 0}),
        "shared_intermediate_size": own.get(SHARED_INNER if count else "feed_forward_length"),
        "attention_bias": f"blk.{first}.attn_q.bias" in model.tensors,
        "num_key_value_heads": int(heads.max()) or own["attention.head_count"],
        "layer_types": kinds,
        "position_embedding_type": _ROPE if own.get(ROPE_SWITCH, True) else None,
        "mamba_expand": sizes["expand"],
        "mamba_n_heads": sizes["heads"],
        "mamba_d_head": sizes["head_dim"],
        "mamba_n_groups": sizes["groups"],
        "mamba_d_state": sizes["state_dim"],
        "mamba_d_conv": sizes["taps"],
    }


def _to_fields(config: GraniteMoeHybridKeys) -> GgufFields:
    """llama.cpp uses the field for fine-tuned rope as a switch of rope here."""
    if {*config.kinds} != {FULL, LINEAR}:
        raise UnsupportedError(f"layer_types: llama.cpp needs layers of both {FULL} and {LINEAR} in this architecture")
    own = {
        **config.mixer.to_fields(),
        _HEADS_BY_LAYER: [config.kv_heads if kind == FULL else 0 for kind in config.kinds],
        ROPE_SWITCH: config.turns,
        SHARED_INNER: config.shared_intermediate_size,
    }
    if config.num_local_experts:
        own |= expert_fields(config.num_local_experts, config.num_experts_per_tok)
    else:
        own["feed_forward_length"] = config.shared_intermediate_size
    return to_fields(config).plus(own)


FAMILY = Family(
    name="granitemoehybrid",
    class_name="GraniteMoeHybridForCausalLM",
    keys=GraniteMoeHybridKeys,
    program=_program,
    layout=_layout,
    gguf=GgufForm("granitehybrid", _to_config, _to_fields, _gguf_layout, factors=True),
)
