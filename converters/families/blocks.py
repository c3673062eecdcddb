"""Pieces of programs that families have in common: embedding, attention, feed-forward, logits. Knows no family.

Values have the same names everywhere: x is the residual stream, h its normed copy, o the output of attention, d the
output of the feed-forward part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.model.frequencies import Frequencies
from rkf.model.ops import Add, Attention, Embed, Experts, Gate, Linear, Logits, Norm, Op, Rope, Route
from rkf.model.program import Program

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Layer = tuple[Op, ...]


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """A norm of queries and keys before rope. whole: over all heads together; otherwise per head."""

    epsilon: float
    whole: bool = False
    offset: float = 0.0


def assemble(
    config: DecoderKeys,
    layers: Iterable[Layer],
    ropes: tuple[Frequencies, ...],
    *,
    embedding_scale: float = 1.0,
    norm_offset: float = 0.0,
    softcap: float | None = None,
) -> Program:
    """A program of these layers. Equal layers become one kind."""
    kinds: dict[Layer, int] = {}
    order = tuple(kinds.setdefault(layer, len(kinds)) for layer in layers)
    return Program(
        stem=(Embed(dst="x", table=EMBEDDING, rows=config.vocab_size, cols=config.hidden_size, scale=embedding_scale),),
        kinds=tuple(kinds),
        order=order,
        top=(
            Norm(src="x", dst="h", weight=FINAL_NORM, epsilon=config.rms_norm_eps, offset=norm_offset),
            Logits(src="h", dst="logits", weight=HEAD, rows=config.vocab_size, softcap=softcap),
        ),
        ropes=ropes,
    )


def norm(config: DecoderKeys, name: str, src: str = "x", dst: str = "h", offset: float = 0.0) -> Norm:
    """An RMS norm over the whole of src."""
    return Norm(src=src, dst=dst, weight=f"{name}.weight", epsilon=config.rms_norm_eps, offset=offset)


def add(branch: str) -> Add:
    """The residual addition of a branch."""
    return Add(a="x", b=branch, dst="x")


def attention(
    config: DecoderKeys,
    src: str = "h",
    *,
    biases: str = "",
    head_norm: HeadNorm | None = None,
    rope: int = 0,
    scale: float | None = None,
    window: int | None = None,
) -> Layer:
    """Attention on src, written to o. biases: those of q, k, v, o that have one. scale: by default head_dim ** -0.5."""
    size, heads, kv_heads = config.head_size, config.num_attention_heads, config.kv_heads
    ops: list[Op] = [
        _linear(src, part, f"self_attn.{part}_proj", (heads if part == "q" else kv_heads) * size, part in biases)
        for part in "qkv"
    ]
    if head_norm is not None:
        ops += [
            Norm(
                src=part,
                dst=part,
                weight=f"self_attn.{part}_norm.weight",
                epsilon=head_norm.epsilon,
                group=None if head_norm.whole else size,
                offset=head_norm.offset,
            )
            for part in "qk"
        ]
    ops += [Rope(src=part, dst=part, table=rope, head_dim=size) for part in "qk"]
    return (
        *ops,
        Attention(
            q="q",
            k="k",
            v="v",
            dst="a",
            heads=heads,
            kv_heads=kv_heads,
            head_dim=size,
            value_dim=size,
            scale=size**-0.5 if scale is None else scale,
            window=window,
        ),
        _linear("a", "o", "self_attn.o_proj", config.hidden_size, "o" in biases),
    )


def gated(config: DecoderKeys, src: str = "h", *, bias: bool = False) -> Layer:
    """act(gate) * up, then down, written to d."""
    return (
        _linear(src, "gate", "mlp.gate_proj", config.intermediate_size, bias),
        _linear(src, "up", "mlp.up_proj", config.intermediate_size, bias),
        Gate(a="gate", b="up", dst="m", act=config.hidden_act),
        _linear("m", "d", "mlp.down_proj", config.hidden_size, bias),
    )


def experts(config: DecoderKeys, inner: int, experts: int, count: int, *, normalise: bool) -> Layer:
    """The sum of `count` chosen experts, weighted by the softmax of a router's logits, written to d."""
    return (
        Route(
            src="h",
            dst="r",
            weight="mlp.gate.weight",
            experts=experts,
            count=count,
            score="softmax",
            normalise=normalise,
        ),
        Experts(
            src="h",
            route="r",
            dst="d",
            gate="mlp.experts.gate_proj.weight",
            up="mlp.experts.up_proj.weight",
            down="mlp.experts.down_proj.weight",
            inner=inner,
            rows=config.hidden_size,
            act=config.hidden_act,
        ),
    )


def pre_norm_layer(config: DecoderKeys, attends: Layer, feeds: Layer) -> Layer:
    """The most common layer: each branch reads a normed copy of the stream and adds to it."""
    return (
        norm(config, "input_layernorm"),
        *attends,
        add("o"),
        norm(config, "post_attention_layernorm"),
        *feeds,
        add("d"),
    )


def _linear(src: str, dst: str, name: str, rows: int, bias: bool) -> Linear:
    return Linear(src=src, dst=dst, weight=f"{name}.weight", rows=rows, bias=f"{name}.bias" if bias else None)
