"""llama4_text: Llama 4, text only. Chunked attention, layers without rope whose queries grow, experts.

From a checkpoint with vision, only the decoder is converted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import (
    Layer,
    Temperature,
    assemble,
    attention,
    experts,
    gated,
    pre_norm_layer,
    with_shared_expert,
)
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel, Wrapper
from rkf.converters.families.gguf_config import whole_rope
from rkf.converters.families.gguf_experts import INNER, expert_config, expert_fields
from rkf.converters.families.gguf_rope import rope_fields
from rkf.converters.families.keys import (
    CHUNKED,
    FULL,
    flag,
    layer_numbers,
    layer_types,
    number,
    optional_size,
    size,
    token,
    tokens,
)
from rkf.converters.families.layout import Layout, Origin, as_named
from rkf.converters.families.layout_transforms import Transposed
from rkf.converters.families.roped_layers import INTERVAL, RopedLayers
from rkf.converters.families.windows import WINDOW, one_rope, periodic, window_config
from rkf.errors import SourceError, UnsupportedError
from rkf.model.op import Op
from rkf.model.ops import Attention, Norm, Route
from rkf.model.program import MAX_LAYERS, Program

# What llama.cpp assumes.
_CHUNK, _BETA = 8192, 0.1
_EXPERTS_WITHOUT_NORMS = 128  # llama.cpp recognises by this the one model that has no norms of q and k
_STEP = "interleave_moe_layer_step"


@dataclass(frozen=True, kw_only=True)
class Llama4Keys(RopedLayers):
    """intermediate_size is that of experts; dense layers have intermediate_size_mlp."""

    vocab_size: int = size(202048)
    hidden_size: int = size(5120)
    intermediate_size: int = size(8192)
    intermediate_size_mlp: int = size(16384)
    num_hidden_layers: int = size(48, most=MAX_LAYERS)
    num_attention_heads: int = size(40)
    num_key_value_heads: int | None = optional_size(8)
    head_dim: int = size(128)
    max_position_embeddings: int = size(131072)
    rms_norm_eps: float = number(1e-5)
    rope_theta: float = number(500000.0)
    num_local_experts: int = size(16, most=1 << 16)
    num_experts_per_tok: int = size(1)
    moe_layers: tuple[int, ...] | None = layer_numbers(or_null=True)
    interleave_moe_layer_step: int = size(1)
    use_qk_norm: bool = flag(True)
    attention_chunk_size: int | None = optional_size(_CHUNK)
    layer_types: tuple[str, ...] | None = layer_types(FULL, CHUNKED)
    attn_temperature_tuning: bool = flag(True)
    floor_scale: int = size(_CHUNK)
    attn_scale: float = number(_BETA)
    attention_bias: bool = flag(False)
    bos_token_id: int | None = token(1)
    eos_token_id: tuple[int, ...] = tokens(2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_types and len(self.layer_types) < self.num_hidden_layers:
            expected = f"at least {self.num_hidden_layers} words"
            raise SourceError(f"layer_types: expected {expected}, got {len(self.layer_types)}")
        if self.attention_chunk_size is None and CHUNKED in self.kinds:
            raise SourceError(f"attention_chunk_size: expected a number, as layer_types has {CHUNKED}, got null")

    @property
    def kinds(self) -> tuple[str, ...]:
        if self.layer_types is not None:
            return self.layer_types[: self.num_hidden_layers]
        return tuple(CHUNKED if turned and self.attention_chunk_size else FULL for turned in self.ropes)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        if self.moe_layers is not None:
            return layer in self.moe_layers
        return (layer + 1) % self.interleave_moe_layer_step == 0


def _program(config: Llama4Keys) -> Program:
    turns = rope_scaling.table(rope_scaling.whole(config), config)
    layers = (
        pre_norm_layer(
            config,
            _attention(config, turned, kind),
            _mixture(config) if config.is_sparse(number) else gated(config, inner=config.intermediate_size_mlp),
        )
        for number, (turned, kind) in enumerate(zip(config.ropes, config.kinds, strict=True))
    )
    return assemble(config, layers, (turns,))


def _attention(config: Llama4Keys, turned: bool, kind: str) -> Layer:
    """Norms of q and k come after rope and have no weights; layers without rope have none."""
    grows = config.attn_temperature_tuning and not turned
    found = attention(
        config,
        biases="qkvo" if config.attention_bias else "",
        rope=0 if turned else None,
        pairs="neighbours",
        chunk=config.attention_chunk_size if kind == CHUNKED else None,
        temperature=Temperature(config.attn_scale, config.floor_scale, 1) if grows else None,
    )
    if not (config.use_qk_norm and turned):
        return found
    normed: list[Op] = [Norm(src=part, dst=part, epsilon=config.rms_norm_eps, group=config.head_size) for part in "qk"]
    at = next(number for number, op in enumerate(found) if isinstance(op, Attention))
    return (*found[:at], *normed, *found[at:])


def _mixture(config: Llama4Keys) -> Layer:
    route = Route(
        src="h",
        dst="r",
        weight="mlp.gate.weight",
        experts=config.num_local_experts,
        count=config.num_experts_per_tok,
        score="sigmoid",
    )
    inner = config.intermediate_size
    chosen = experts(config, route, inner, scale_input=True)
    return with_shared_expert(config, chosen, inner, "mlp.shared_expert")


def _layout(config: Llama4Keys) -> Layout:
    stack, inner = slice(0, config.num_local_experts), config.intermediate_size
    columns = {"gate_proj": slice(0, inner), "up_proj": slice(inner, 2 * inner)}

    def layout(name: str) -> tuple[Origin, ...]:
        if not name.startswith("mlp."):
            return as_named(name)
        name = "feed_forward." + name.removeprefix("mlp.").replace("gate.weight", "router.weight")
        if not name.startswith("feed_forward.experts."):
            return as_named(name)
        matrix = name.split(".")[2]
        if matrix == "down_proj":
            return (Origin(("feed_forward.experts.down_proj",), steps=(Transposed(),)),)
        part = (stack, slice(0, config.hidden_size), columns[matrix])
        return (Origin(("feed_forward.experts.gate_up_proj",), part, (Transposed(),)),)

    return layout


def _to_config(model: GgufModel) -> dict[str, Any]:
    own = model.own
    one_rope(own)
    kinds = window_config({**own, WINDOW: _CHUNK}, INTERVAL)["layer_types"]  # it takes 8192 for any number but 0
    if own.get(WINDOW) == 0 or tuple(kinds) != periodic(own["block_count"], INTERVAL):
        raise UnsupportedError(f"{WINDOW}: chunks are supported only in every layer but each {INTERVAL}th")
    return {
        **expert_config(own, "num_local_experts"),
        "intermediate_size": own.get(INNER),
        "intermediate_size_mlp": own.get("feed_forward_length"),
        _STEP: own.get(_STEP, 1),
        "use_qk_norm": own.get("expert_count") != _EXPERTS_WITHOUT_NORMS,
        **whole_rope(model),
    }


def _to_fields(config: Llama4Keys) -> GgufFields:
    normed = config.num_local_experts != _EXPERTS_WITHOUT_NORMS
    config.refuse(config.attention_bias, "attention_bias", "false: llama.cpp has no biases here")
    config.refuse(config.attention_chunk_size != _CHUNK, "attention_chunk_size", f"{_CHUNK}, which llama.cpp assumes")
    config.refuse(not config.attn_temperature_tuning, "attn_temperature_tuning", "true, as llama.cpp computes it")
    config.refuse(config.floor_scale != _CHUNK, "floor_scale", f"{_CHUNK}, which llama.cpp assumes")
    config.refuse(config.attn_scale != _BETA, "attn_scale", f"{_BETA}, which llama.cpp assumes")
    config.refuse(config.use_qk_norm != normed, "use_qk_norm", f"{normed}, which llama.cpp assumes")
    layers = range(config.num_hidden_layers)
    config.refuse_other_ropes()
    if config.kinds != tuple(CHUNKED if turned else FULL for turned in config.ropes):
        raise UnsupportedError("layer_types: llama.cpp assumes chunks in the layers with rope alone")
    if [config.is_sparse(number) for number in layers] != [
        (n + 1) % config.interleave_moe_layer_step == 0 for n in layers
    ]:
        raise UnsupportedError(f"moe_layers: a GGUF has only {_STEP}")
    own = {
        **expert_fields(config.num_local_experts, config.num_experts_per_tok, config.intermediate_size),
        "feed_forward_length": config.intermediate_size_mlp,
        _STEP: config.interleave_moe_layer_step,
    }
    return rope_fields(rope_scaling.whole(config), config.head_size).plus(own)


FAMILY = Family(
    name="llama4_text",
    class_name="Llama4ForCausalLM",
    keys=Llama4Keys,
    program=_program,
    layout=_layout,
    gguf=GgufForm("llama4", _to_config, _to_fields, factors=True),
    wrapper=Wrapper("llama4", ("language_model.model.",), ("vision_model.", "multi_modal_projector."), None),
)
