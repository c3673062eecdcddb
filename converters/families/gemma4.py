"""gemma4_text: Gemma 4, text only. Norms on both sides of a branch; windows, ropes and head widths differ by layer.

Options: an input of each layer from a second embedding, layers that share keys and values, values that are keys before
their norm, experts beside the dense unit. From a checkpoint that sees or hears, only the decoder is converted.
gemma4_keys.py has the keys, gemma4_gguf.py the form in GGUF.
"""

from __future__ import annotations

from rkf.converters.families.blocks import EMBEDDING, HEAD, Layer, add, gated, linear, norm
from rkf.converters.families.expert_layout import fused_stacks
from rkf.converters.families.family import Family, Wrapper
from rkf.converters.families.gemma4_gguf import GGUF
from rkf.converters.families.gemma4_keys import Gemma4Keys
from rkf.converters.families.keys import FULL
from rkf.converters.families.layout import Layout, as_named
from rkf.model.op import Op
from rkf.model.ops import Add, Attention, Embed, Experts, Gate, Logits, Norm, Rope, Route, Scale
from rkf.model.program import Program, layer_of


def program(config: Gemma4Keys) -> Program:
    ropes = {kind: config.frequencies(kind) for kind in dict.fromkeys(config.kinds)}
    numbers = {kind: number for number, kind in enumerate(ropes)}
    kinds: dict[Layer, int] = {}
    layers = (_layer(config, layer, numbers[kind]) for layer, kind in enumerate(config.kinds))
    order = tuple(kinds.setdefault(layer, len(kinds)) for layer in layers)
    return Program(
        stem=_stem(config),
        kinds=tuple(kinds),
        order=order,
        top=(
            norm(config, "model.norm"),
            Logits(
                src="h",
                dst="logits",
                weight=HEAD,
                rows=config.vocab_size,
                softcap=config.final_logit_softcapping,
            ),
        ),
        ropes=tuple(ropes.values()),
    )


def _stem(config: Gemma4Keys) -> Layer:
    """The embedding, and the inputs of all layers side by side in p."""
    width, each = config.hidden_size, config.hidden_size_per_layer_input
    stream = Embed(dst="x", table=EMBEDDING, rows=config.vocab_size, cols=width, scale=width**0.5)
    if not each:
        return (stream,)
    whole = config.num_hidden_layers * each
    return (
        stream,
        Embed(
            dst="e",
            table="model.embed_tokens_per_layer.weight",
            rows=config.vocab_size_per_layer_input,
            cols=whole,
            scale=each**0.5,
        ),
        linear("x", "p", "model.per_layer_model_projection", whole, False),
        Scale(src="p", dst="p", factor=width**-0.5),
        Norm(
            src="p", dst="p", weight="model.per_layer_projection_norm.weight", epsilon=config.rms_norm_eps, group=each
        ),
        Add(a="p", b="e", dst="p"),
        Scale(src="p", dst="p", factor=2**-0.5),
    )


def _layer(config: Gemma4Keys, layer: int, rope: int) -> Layer:
    wide = config.use_double_wide_mlp and layer >= config.first_shared
    return (
        norm(config, "input_layernorm"),
        *_attention(config, layer, rope),
        norm(config, "post_attention_layernorm", "o", "o"),
        add("o"),
        norm(config, "pre_feedforward_layernorm"),
        *gated(config, inner=config.intermediate_size * (2 if wide else 1)),
        *(_experts(config) if config.enable_moe_block else ()),
        norm(config, "post_feedforward_layernorm", "d", "d"),
        add("d"),
        *(_own_input(config, config.hidden_size_per_layer_input) if config.hidden_size_per_layer_input else ()),
        Scale(src="x", dst="x", weight="layer_scalar"),
    )


def _attention(config: Gemma4Keys, layer: int, rope: int) -> Layer:
    """Attention on h, written to o."""
    kind, (size, kv_heads) = config.kinds[layer], config.heads(layer)
    bias, heads, shares = config.attention_bias, config.num_attention_heads, layer >= config.first_shared

    def head_norm(part: str, src: str, weighted: bool = True) -> Norm:
        weight = f"self_attn.{part}_norm.weight" if weighted else None
        return Norm(src=src, dst=part, weight=weight, epsilon=config.rms_norm_eps, group=size)

    def turned(part: str) -> Rope:
        return Rope(src=part, dst=part, table=rope, head_dim=size)

    ops: list[Op] = [linear("h", "q", "self_attn.q_proj", heads * size, bias), head_norm("q", "q"), turned("q")]
    if not shares:
        ops.append(linear("h", "k", "self_attn.k_proj", kv_heads * size, bias))
        keys_are_values = config.attention_k_eq_v and kind == FULL
        if not keys_are_values:
            ops.append(linear("h", "v", "self_attn.v_proj", kv_heads * size, bias))
        ops += [head_norm("v", "k" if keys_are_values else "v", weighted=False), head_norm("k", "k"), turned("k")]
    last = max((n for n in range(config.first_shared) if config.kinds[n] == kind), default=0)
    return (
        *ops,
        Attention(
            q="q",
            k=None if shares else "k",
            v=None if shares else "v",
            shares=last if shares else None,
            dst="a",
            heads=heads,
            kv_heads=kv_heads,
            head_dim=size,
            value_dim=size,
            scale=1.0,
            window=config.window(kind),
        ),
        linear("a", "o", "self_attn.o_proj", config.hidden_size, bias),
    )


def _experts(config: Gemma4Keys) -> Layer:
    """The chosen experts, added to d. They and their router read the stream, each through its own norm."""
    return (
        norm(config, "post_feedforward_layernorm_1", "d", "d"),
        Norm(src="x", dst="s", weight="router.scale", epsilon=config.rms_norm_eps),
        Scale(src="s", dst="s", factor=config.hidden_size**-0.5),
        Route(
            src="s",
            dst="r",
            weight="router.proj.weight",
            experts=config.num_experts or 0,
            count=config.top_k_experts or 0,
            score="softmax",
            normalise=True,
            expert_scale="router.per_expert_scale",
        ),
        norm(config, "pre_feedforward_layernorm_2"),
        Experts(
            src="h",
            route="r",
            dst="t",
            gate="mlp.experts.gate_proj.weight",
            up="mlp.experts.up_proj.weight",
            down="mlp.experts.down_proj.weight",
            inner=config.moe_intermediate_size or 0,
            rows=config.hidden_size,
            act=config.hidden_act,
        ),
        norm(config, "post_feedforward_layernorm_2", "t", "t"),
        Add(a="d", b="t", dst="d"),
    )


def _own_input(config: Gemma4Keys, width: int) -> Layer:
    """The layer's own part of p, gated by the stream and added to it."""
    return (
        linear("x", "g", "per_layer_input_gate", width, False),
        Gate(a="g", b="p", dst="g", act=config.hidden_act, by_layer=True),
        linear("g", "d", "per_layer_projection", config.hidden_size, False),
        norm(config, "post_per_layer_input_norm", "d", "d"),
        add("d"),
    )


def layout(config: Gemma4Keys) -> Layout:
    if not config.enable_moe_block:
        return as_named
    experts, inner = config.num_experts or 0, config.moe_intermediate_size or 0
    return fused_stacks(experts, inner, "experts.gate_up_proj", "experts.down_proj")


def unused(config: Gemma4Keys, name: str) -> bool:
    """Layers that read keys and values of another may have the tensors of their own in a checkpoint."""
    _, _, part = name.partition(".self_attn.")
    layer = layer_of(name)
    return layer is not None and layer >= config.first_shared and part.startswith(("k_", "v_"))


FAMILY = Family(
    name="gemma4_text",
    class_name="Gemma4ForCausalLM",
    keys=Gemma4Keys,
    program=program,
    layout=layout,
    unused=unused,
    gguf=GGUF,
    wrapper=Wrapper(
        model_type="gemma4",
        prefixes=("model.language_model.",),
        dropped=("model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio."),
        tied=True,
    ),
)
