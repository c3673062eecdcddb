"""gpt_neox: GPT-NeoX and Pythia. LayerNorm, fused q/k/v by head, no gate, usually both branches beside each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import (
    HEAD,
    LAYER_NORM,
    Layer,
    add,
    assemble,
    attention,
    norm,
    pre_norm_layer,
    ungated,
)
from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import LAYER_NORM_EPSILON, head_size, layer_norm_fields
from rkf.converters.families.gguf_rope import rope_config, rope_fields, shortest
from rkf.converters.families.keys import activation, flag, number, size, token, tokens
from rkf.converters.families.layout import Layout, Origin, fused_rows, renamed
from rkf.model.program import MAX_LAYERS, Program

_FUSED, _PARTS = "attention.query_key_value", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_NAMES = {
    "model.embed_tokens": "gpt_neox.embed_in",
    "model.norm": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
    "self_attn.o_proj": "attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}


@dataclass(frozen=True, kw_only=True)
class GptNeoXKeys(DecoderKeys):
    vocab_size: int = size(50432)
    hidden_size: int = size(6144)
    intermediate_size: int = size(24576)
    num_hidden_layers: int = size(44, most=MAX_LAYERS)
    num_attention_heads: int = size(64)
    hidden_act: str = activation("gelu")
    rms_norm_eps: float = number(1e-5, name="layer_norm_eps")
    rope_theta: float = number(10000.0, name="rotary_emb_base")
    partial_rotary_factor: float | None = number(0.25, name="rotary_pct")
    attention_bias: bool = flag(True)
    use_parallel_residual: bool = flag(True)
    bos_token_id: int | None = token(0)
    eos_token_id: tuple[int, ...] = tokens(2)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.usual_heads()

    @property
    def kv_heads(self) -> int:
        """The reference ignores num_key_value_heads."""
        return self.num_attention_heads


def _program(config: GptNeoXKeys) -> Program:
    turns = rope_scaling.table(rope_scaling.parameters(config), config)
    attends, feeds = attention(config, biases="qkvo" if config.attention_bias else ""), ungated(config, bias=True)
    if config.use_parallel_residual:
        layer = _side_by_side(config, attends, feeds)
    else:
        layer = pre_norm_layer(config, attends, feeds, style=LAYER_NORM)
    return assemble(config, [layer] * config.num_hidden_layers, (turns,), final_norm=LAYER_NORM)


def _side_by_side(config: GptNeoXKeys, attends: Layer, feeds: Layer) -> Layer:
    """Both branches read the same stream, each through its own norm."""
    return (
        norm(config, "input_layernorm", style=LAYER_NORM),
        *attends,
        norm(config, "post_attention_layernorm", style=LAYER_NORM),
        *feeds,
        add("o"),
        add("d"),
    )


def _layout(config: GptNeoXKeys) -> Layout:
    """In the fused matrix, each head has its rows of q, then k, then v."""
    width, others = config.head_size, renamed(_NAMES)
    starts = {part: number * width for number, part in enumerate(_PARTS)}

    def layout(name: str) -> tuple[Origin, ...]:
        module, _, last = name.rpartition(".")
        if name == HEAD:  # transformers 5 may name it as other models do
            return *others(name), Origin((name,))
        if module not in starts:
            return others(name)
        rows = slice(starts[module], starts[module] + width)
        return (Origin((f"{_FUSED}.{last}",), (rows,), heads=config.num_attention_heads),)

    return layout


def _gguf_layout(config: GptNeoXKeys) -> Layout:
    """llama.cpp's converter puts all rows of q first, then those of k, then those of v."""
    fused, others = fused_rows({_FUSED: dict.fromkeys(_PARTS, config.hidden_size)}), renamed(_NAMES)
    return lambda name: fused(name) if name.rpartition(".")[0] in _PARTS else others(name)


def _to_config(model: GgufModel) -> dict[str, Any]:
    own, width = model.own, head_size(model)
    turns = rope_config(model, width) | {"partial_rotary_factor": own.get("rope.dimension_count", width) / width}
    return {
        "layer_norm_eps": shortest(own.get(LAYER_NORM_EPSILON)),
        "hidden_act": "gelu",
        "attention_bias": "blk.0.attn_qkv.bias" in model.tensors,
        "use_parallel_residual": own.get("use_parallel_residual", True),
        **rope_scaling.spelt(turns),
        "rotary_emb_base": turns["rope_theta"],  # as read by transformers 4
        "rotary_pct": turns["partial_rotary_factor"],
    }


def _to_fields(config: GptNeoXKeys) -> GgufFields:
    config.refuse(config.tie_word_embeddings, "tie_word_embeddings", "false: llama.cpp needs a separate head")
    config.refuse(not config.attention_bias, "attention_bias", "true: llama.cpp needs biases here")
    own = {**layer_norm_fields(config), "use_parallel_residual": config.use_parallel_residual}
    return rope_fields(rope_scaling.parameters(config), config.head_size).plus(own)


FAMILY = Family(
    name="gpt_neox",
    class_name="GPTNeoXForCausalLM",
    keys=GptNeoXKeys,
    program=_program,
    layout=_layout,
    gguf=GgufForm("gptneox", _to_config, _to_fields, _gguf_layout, activation="gelu"),
    prefix="gpt_neox.",
)
