"""Pieces of programs that families have in common: embedding, attention, feed-forward, logits. Knows no family.

Values have the same names everywhere: x is the residual stream, h its normed copy, o the output of attention, d the
output of the feed-forward part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rkf.converters.families.decoder_keys import DecoderKeys
from rkf.model.frequencies import Frequencies
from rkf.model.op import Op
from rkf.model.ops import Add, Attention, Clip, Embed, Experts, Gate, Linear, Logits, Norm, Rope, Route
from rkf.model.program import Program

EMBEDDING, FINAL_NORM = "model.embed_tokens.weight", "model.norm"
HEAD, HEAD_BIAS = "lm_head.weight", "lm_head.bias"
Layer = tuple[Op, ...]


@dataclass(frozen=True, slots=True)
class NormStyle:
    """A kind of norm. offset: added to its weights. centred: the mean is subtracted first (LayerNorm)."""

    offset: float = 0.0
    centred: bool = False
    bias: bool = False


RMS, LAYER_NORM = NormStyle(), NormStyle(centred=True, bias=True)


@dataclass(frozen=True, slots=True)
class Temperature:
    """Queries times 1 + beta * ln(1 + floor((position + offset) / length))."""

    beta: float
    length: int
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """A norm of queries and keys before rope. whole: over all heads together; otherwise per head. own: each head has
    weights of its own. centred: see NormStyle.
    """

    epsilon: float
    whole: bool = False
    offset: float = 0.0
    own: bool = False
    centred: bool = False


def assemble(
    config: DecoderKeys,
    layers: Iterable[Layer],
    ropes: tuple[Frequencies, ...],
    *,
    embedding_scale: float = 1.0,
    final_norm: NormStyle = RMS,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    head_bias: bool = False,
) -> Program:
    """A program of these layers. Equal layers become one kind."""
    kinds: dict[Layer, int] = {}
    order = tuple(kinds.setdefault(layer, len(kinds)) for layer in layers)
    return Program(
        stem=(Embed(dst="x", table=EMBEDDING, rows=config.vocab_size, cols=config.hidden_size, scale=embedding_scale),),
        kinds=tuple(kinds),
        order=order,
        top=(
            norm(config, FINAL_NORM, style=final_norm),
            Logits(
                src="h",
                dst="logits",
                weight=HEAD,
                bias=HEAD_BIAS if head_bias else None,
                rows=config.vocab_size,
                scale=logit_scale,
                softcap=softcap,
            ),
        ),
        ropes=ropes,
    )


def norm(config: DecoderKeys, name: str, src: str = "x", dst: str = "h", style: NormStyle = RMS) -> Norm:
    """A norm over the whole of src."""
    return Norm(
        src=src,
        dst=dst,
        weight=f"{name}.weight",
        bias=f"{name}.bias" if style.bias else None,
        epsilon=config.rms_norm_eps,
        offset=style.offset,
        centred=style.centred,
    )


def add(branch: str, scale: float = 1.0) -> Add:
    """The residual addition of a branch, times scale."""
    return Add(a="x", b=branch, dst="x", scale=scale)


def attention(
    config: DecoderKeys,
    src: str = "h",
    *,
    biases: str = "",
    head_norm: HeadNorm | None = None,
    rope: int | None = 0,
    pairs: str = "halves",
    scale: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    temperature: Temperature | None = None,
    clip: float | None = None,
    sinks: bool = False,
    gate: bool = False,
) -> Layer:
    """Attention on src, written to o. biases: those of q, k, v, o that have one. scale: by default head_dim ** -0.5.

    rope: the number of its table, None for a layer without rope. pairs: the numbers that it rotates together. clip: a
    limit of q, k and v before rope. gate: the result is multiplied by the sigmoid of gate_proj.
    """
    size, heads, kv_heads = config.head_size, config.num_attention_heads, config.kv_heads
    ops: list[Op] = [
        linear(src, part, f"self_attn.{part}_proj", (heads if part == "q" else kv_heads) * size, part in biases)
        for part in "qkv"
    ]
    if gate:
        ops.append(linear(src, "g", "self_attn.gate_proj", heads * size, "q" in biases))
    if head_norm is not None:
        ops += [
            Norm(
                src=part,
                dst=part,
                weight=f"self_attn.{part}_norm.weight",
                epsilon=head_norm.epsilon,
                group=None if head_norm.whole else size,
                offset=head_norm.offset,
                centred=head_norm.centred,
                by_group=head_norm.own,
            )
            for part in "qk"
        ]
    if clip is not None:
        ops += [Clip(src=part, dst=part, limit=clip) for part in "qkv"]
    if rope is not None:
        ops += [Rope(src=part, dst=part, table=rope, head_dim=size, pairs=pairs) for part in "qk"]
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
            chunk=chunk,
            softcap=softcap,
            sinks="self_attn.sinks" if sinks else None,
            temperature_beta=temperature.beta if temperature else None,
            temperature_length=temperature.length if temperature else None,
            temperature_offset=temperature.offset if temperature else None,
        ),
        *((Gate(a="g", b="a", dst="a", act="sigmoid"),) if gate else ()),
        linear("a", "o", "self_attn.o_proj", config.hidden_size, "o" in biases),
    )


def gated(
    config: DecoderKeys,
    src: str = "h",
    *,
    bias: bool = False,
    name: str = "mlp",
    inner: int | None = None,
    dst: str = "d",
) -> Layer:
    """act(gate) * up, then down, written to dst. inner: the width between, by default intermediate_size."""
    inner = inner or config.intermediate_size
    return (
        linear(src, "gate", f"{name}.gate_proj", inner, bias),
        linear(src, "up", f"{name}.up_proj", inner, bias),
        Gate(a="gate", b="up", dst="m", act=config.hidden_act),
        linear("m", dst, f"{name}.down_proj", config.hidden_size, bias),
    )


def ungated(config: DecoderKeys, src: str = "h", *, bias: bool = False) -> Layer:
    """act(up), then down, written to d."""
    return (
        linear(src, "up", "mlp.up_proj", config.intermediate_size, bias),
        Gate(a="up", dst="m", act=config.hidden_act),
        linear("m", "d", "mlp.down_proj", config.hidden_size, bias),
    )


def softmax_route(experts: int, count: int, *, normalise: bool) -> Route:
    """The `count` experts of the highest softmax, weighted by it."""
    return Route(
        src="h",
        dst="r",
        weight="mlp.gate.weight",
        experts=experts,
        count=count,
        score="softmax",
        normalise=normalise,
    )


def experts(config: DecoderKeys, route: Route, inner: int, *, scale_input: bool = False) -> Layer:
    """The sum of the experts that `route` chooses, each of them gated, written to d. inner: their width between.

    scale_input: the router's weights multiply what experts read instead of what they write.
    """
    return (
        route,
        Experts(
            src=route.src,
            route=route.dst,
            dst="d",
            gate="mlp.experts.gate_proj.weight",
            up="mlp.experts.up_proj.weight",
            down="mlp.experts.down_proj.weight",
            inner=inner,
            rows=config.hidden_size,
            act=config.hidden_act,
            scale_input=scale_input,
        ),
    )


def with_shared_expert(
    config: DecoderKeys, chosen: Layer, inner: int, name: str, switch: str | None = None, bias: bool = False
) -> Layer:
    """One more expert for every token, added to the chosen ones. switch: a sigmoid of this row's product weighs it."""
    weighed: Layer = ()
    if switch is not None:
        weighed = (linear("h", "g", switch, 1, False), Gate(a="g", b="s", dst="s", act="sigmoid"))
    return (*chosen, *gated(config, name=name, inner=inner, dst="s", bias=bias), *weighed, Add(a="d", b="s", dst="d"))


def pre_norm_layer(
    config: DecoderKeys, attends: Layer, feeds: Layer, *, style: NormStyle = RMS, residual: float = 1.0
) -> Layer:
    """The most common layer: each branch reads a normed copy of the stream and adds to it, times residual."""
    return (
        norm(config, "input_layernorm", style=style),
        *attends,
        add("o", residual),
        norm(config, "post_attention_layernorm", style=style),
        *feeds,
        add("d", residual),
    )


def post_norm_layer(config: DecoderKeys, attends: Layer, feeds: Layer) -> Layer:
    """Each branch reads the stream itself, and is normed before it is added. The branches read x."""
    return (
        *attends,
        norm(config, "post_attention_layernorm", "o", "o"),
        add("o"),
        *feeds,
        norm(config, "post_feedforward_layernorm", "d", "d"),
        add("d"),
    )


def double_norm_layer(
    config: DecoderKeys, attends: Layer, feeds: Layer, names: tuple[str, str, str, str], style: NormStyle = RMS
) -> Layer:
    """A norm before each branch and one after it. names: of the four norms, in order of use."""
    before, after, feed_before, feed_after = names
    return (
        norm(config, before, style=style),
        *attends,
        norm(config, after, "o", "o", style),
        add("o"),
        norm(config, feed_before, style=style),
        *feeds,
        norm(config, feed_after, "d", "d", style),
        add("d"),
    )


def parallel_layer(config: DecoderKeys, attends: Layer, feeds: Layer, style: NormStyle) -> Layer:
    """Both branches read the same normed copy of the stream."""
    return norm(config, "input_layernorm", style=style), *attends, *feeds, add("o"), add("d")


def linear(src: str, dst: str, name: str, rows: int, bias: bool) -> Linear:
    """A matrix times src, plus its bias if it has one."""
    return Linear(src=src, dst=dst, weight=f"{name}.weight", rows=rows, bias=f"{name}.bias" if bias else None)
