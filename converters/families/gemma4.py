"""gemma4_text: Gemma 4, text only. Norms on both sides of a branch; windows, ropes and head widths differ by layer.

Options: an input of each layer from a second embedding, layers that share keys and values, values that are keys before
their norm, experts beside the dense unit. From a checkpoint that sees or hears, only the decoder is converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import EMBEDDING, HEAD, Layer, add, gated, linear, norm
from rkf.converters.families.expert_layout import fused_stacks
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel, Wrapper
from rkf.converters.families.keys import (
    FULL,
    SLIDING,
    activation,
    count,
    flag,
    optional_number,
    optional_size,
    size,
    table,
    token,
    tokens,
    word,
)
from rkf.converters.families.layout import Layout, as_named
from rkf.converters.families.windows import Windowed
from rkf.errors import SourceError, UnsupportedError
from rkf.model.frequencies import Frequencies
from rkf.model.op import Op
from rkf.model.ops import Add, Attention, Embed, Experts, Gate, Logits, Norm, Rope, Route, Scale
from rkf.model.program import MAX_LAYERS, Program, layer_of

_PERIOD = 6
# What the reference takes without rope_parameters.
_ROPES: Mapping[str, Any] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}


@dataclass(frozen=True, kw_only=True)
class Gemma4Keys(Windowed):
    vocab_size: int = size(262144)
    hidden_size: int = size(2304)
    intermediate_size: int = size(9216)
    num_hidden_layers: int = size(30, most=MAX_LAYERS)
    num_attention_heads: int = size(8)
    num_key_value_heads: int = size(4)
    head_dim: int = size(256)
    hidden_act: str = activation("gelu_pytorch_tanh", name="hidden_activation")
    max_position_embeddings: int = size(131072)
    tie_word_embeddings: bool = flag(True)
    attention_bias: bool = flag(False)
    sliding_window: int = size(512)
    final_logit_softcapping: float | None = optional_number()
    use_bidirectional_attention: str | None = word()
    vocab_size_per_layer_input: int = size(262144)
    hidden_size_per_layer_input: int = count(256)
    attention_k_eq_v: bool = flag(False)
    num_kv_shared_layers: int = count(0)
    use_double_wide_mlp: bool = flag(False)
    global_head_dim: int = size(512)
    num_global_key_value_heads: int | None = optional_size()
    per_layer_config: Mapping[str, Any] | None = table()
    enable_moe_block: bool = flag(False)
    num_experts: int | None = optional_size()
    top_k_experts: int | None = optional_size()
    moe_intermediate_size: int | None = optional_size()
    bos_token_id: int | None = token(2)
    eos_token_id: tuple[int, ...] = tokens(1)

    def __post_init__(self) -> None:
        super().__post_init__()
        causal = self.use_bidirectional_attention in (None, "vision")
        self.refuse(not causal, "use_bidirectional_attention", "null or 'vision': attention is causal")
        for layer in self.per_layer_config or ():
            if not layer.isdecimal() or int(layer) >= self.num_hidden_layers:
                raise SourceError(f"per_layer_config: expected numbers of layers, got {layer!r}")
        if set(self.kinds[: self.first_shared]) != set(self.kinds):
            raise SourceError("num_kv_shared_layers: expected a layer of each kind before those that share")
        if self.enable_moe_block and not (self.num_experts and self.top_k_experts and self.moe_intermediate_size):
            raise SourceError("enable_moe_block: expected num_experts, top_k_experts and moe_intermediate_size with it")

    @property
    def period(self) -> int:
        return _PERIOD

    @property
    def kinds(self) -> tuple[str, ...]:
        """The last layer always attends to everything."""
        return (*super().kinds[:-1], FULL)

    @property
    def first_shared(self) -> int:
        """The first layer that reads keys and values of another."""
        return max(self.num_hidden_layers - self.num_kv_shared_layers, 0)

    def heads(self, layer: int) -> tuple[int, int]:
        """The width of a layer's heads, and the number of its key heads."""
        if self.per_layer_config is None:
            if self.kinds[layer] == SLIDING:
                return self.head_dim, self.num_key_value_heads
            own = self.num_global_key_value_heads if self.attention_k_eq_v else None
            return self.global_head_dim, own or self.num_key_value_heads
        given = self.per_layer_config.get(str(layer), {})
        known = ("head_dim", "num_key_value_heads")
        if not isinstance(given, dict) or any(
            key not in known or type(value) is not int or value < 1 for key, value in given.items()
        ):
            raise UnsupportedError(f"per_layer_config: {layer}: expected {' and '.join(known)}, got {given!r}")
        return given.get(known[0], self.head_dim), given.get(known[1], self.num_key_value_heads)

    def frequencies(self, kind: str) -> Frequencies:
        """The rope of the layers of a kind."""
        given = (self.rope_parameters or _ROPES).get(kind)
        if not isinstance(given, dict):
            raise SourceError(f"rope_parameters, {kind}: expected an object, got {given!r}")
        widths = {self.heads(layer)[0] for layer, each in enumerate(self.kinds) if each == kind}
        if len(widths) > 1:
            raise UnsupportedError(f"per_layer_config: expected one head_dim for all layers of {kind}")
        kept = given.get("rope_type") == "proportional"
        rope = {"partial_rotary_factor": 1.0, "original_max_position_embeddings": self.max_position_embeddings} | given
        return rope_scaling.frequencies(
            rope if kept else rope_scaling.whole_heads({"rope_type": "default"} | rope),
            widths.pop(),
            self.max_position_embeddings,
        )


def _program(config: Gemma4Keys) -> Program:
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


def _layout(config: Gemma4Keys) -> Layout:
    if not config.enable_moe_block:
        return as_named
    experts, inner = config.num_experts or 0, config.moe_intermediate_size or 0
    return fused_stacks(experts, inner, "experts.gate_up_proj", "experts.down_proj")


def _unused(config: Gemma4Keys, name: str) -> bool:
    """Layers that read keys and values of another may have the tensors of their own in a checkpoint."""
    _, _, part = name.partition(".self_attn.")
    layer = layer_of(name)
    return layer is not None and layer >= config.first_shared and part.startswith(("k_", "v_"))


def _to_config(model: GgufModel) -> dict[str, Any]:
    raise UnsupportedError("a GGUF of gemma4 is not supported; give the Hugging Face checkpoint")


def _to_fields(config: Gemma4Keys) -> GgufFields:
    raise UnsupportedError("gemma4_text: a GGUF of this family is not supported; export a Hugging Face folder")


FAMILY = Family(
    name="gemma4_text",
    class_name="Gemma4ForCausalLM",
    keys=Gemma4Keys,
    program=_program,
    layout=_layout,
    unused=_unused,
    gguf=GgufForm("gemma4", _to_config, _to_fields, activation="gelu_tanh"),
    wrapper=Wrapper(
        model_type="gemma4",
        prefixes=("model.language_model.",),
        dropped=("model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio."),
        tied=True,
    ),
)
