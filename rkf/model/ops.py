"""The ops of a program: what each reads, writes and computes, and the tensors it names (spec/program.md, section 5).

Knows no file, no runtime and no family of models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rkf.format.fields import refuse
from rkf.model.op import (
    EMBEDDING,
    KERNEL,
    MATRIX,
    ROUTER,
    STACK,
    VECTOR,
    Chosen,
    Op,
    Weight,
    Width,
    choice_key,
    flag_key,
    key_of,
    number_key,
    size_key,
    tensor_key,
    value_key,
)

ACTIVATIONS = ("identity", "sigmoid", "silu", "gelu", "gelu_tanh", "relu", "relu2", "xielu")
SCORES = ("softmax", "sigmoid", "chosen")
PAIRS = ("halves", "neighbours")


@dataclass(frozen=True, slots=True, kw_only=True)
class Embed(Op):
    """dst = scale * row of the token. table: f32[rows, cols]."""

    name = "embed"
    table: str = tensor_key()
    rows: int = size_key()
    cols: int = size_key()
    scale: float = number_key(1.0)

    def weights(self, widths: Mapping[str, Width]) -> Iterator[Weight]:
        yield Weight(self.table, (self.rows, self.cols), EMBEDDING)

    def width(self, widths: Mapping[str, Width]) -> Width:
        return self.cols


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm(Op):
    """Groups of `group` numbers of src (by default all of them) divided by their root mean square, times
    (weight + offset).

    y = x * rsqrt(mean(x^2) + epsilon); with `centred`, x is replaced by x - mean(x) first (LayerNorm). weight, bias:
    f32[group], the same for every group; with `by_group`, f32[width of src], each group has its own.
    """

    name = "norm"
    src: str = value_key()
    epsilon: float = number_key(above=0)
    weight: str | None = tensor_key(None)
    bias: str | None = tensor_key(None)
    offset: float = number_key(0.0)
    group: int | None = size_key(None)
    centred: bool = flag_key()
    by_group: bool = flag_key()

    def weights(self, widths: Mapping[str, Width]) -> Iterator[Weight]:
        whole = self.vector(widths, self.src)
        size = whole if self.by_group else self.group or whole
        for name in (self.weight, self.bias):
            if name is not None:
                yield Weight(name, (size,), VECTOR)

    def width(self, widths: Mapping[str, Width]) -> Width:
        whole = self.vector(widths, self.src)
        self.need(whole % (self.group or whole) == 0, f"a group that divides {whole}", self.group)
        self.need(not self.by_group or self.group is not None, "group, as by_group is true", "none")
        return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(Op):
    """dst[r] = sum over c of weight[r, c] * src[c], plus bias[r]. weight: f32[rows, width of src].

    parts: src and dst are cut into so many equal parts, and part n of dst is matrix n of weight times part n of src.
    weight: f32[parts, rows / parts, width of src / parts].
    """

    name = "linear"
    src: str = value_key()
    weight: str = tensor_key()
    rows: int = size_key()
    bias: str | None = tensor_key(None)
    parts: int | None = size_key(None)

    def weights(self, widths: Mapping[str, Width]) -> Iterator[Weight]:
        cols = self.vector(widths, self.src)
        if self.parts is None:
            yield Weight(self.weight, (self.rows, cols), MATRIX)
        else:
            yield Weight(self.weight, (self.parts, self.rows // self.parts, cols // self.parts), STACK)
        if self.bias is not None:
            yield Weight(self.bias, (self.rows,), VECTOR)

    def width(self, widths: Mapping[str, Width]) -> Width:
        cols = self.vector(widths, self.src)
        for size in (cols, self.rows):
            self.need(size % (self.parts or 1) == 0, f"parts that divide {size}", self.parts)
        return self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope(Op):
    """Rotates pairs of the first numbers of every head by position * frequency. table: an index into the program's
    ropes.

    A table of n frequencies rotates the first 2n numbers of each head: pair i is (i, i + n), or with "neighbours"
    (2i, 2i + 1). The others stay.
    """

    name = "rope"
    src: str = value_key()
    table: int = key_of("rope")
    head_dim: int = size_key()
    pairs: str = choice_key(PAIRS, "halves")

    def width(self, widths: Mapping[str, Width]) -> Width:
        whole = self.vector(widths, self.src)
        self.need(whole % self.head_dim == 0, f"a head_dim that divides {whole}", self.head_dim)
        return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention(Op):
    """Causal attention of q over the keys and values of a layer's cache, heads side by side.

    Head n reads key head floor(n * kv_heads / heads). Scores are q·k * scale; with `softcap` c they become
    c * tanh(score / c). A position sees itself and those before it, with `window` W only the last W, with `chunk` C
    only those from the last multiple of C on. sinks: f32[heads], a score each that joins the softmax and has no value.
    q is first multiplied by
    1 + temperature_beta * ln(1 + floor((position + temperature_offset) / temperature_length)), where these are given.

    k and v go into this layer's cache; without them the cache of the earlier layer `shares` is read.
    """

    name = "attention"
    q: str = value_key()
    k: str | None = value_key(None)
    v: str | None = value_key(None)
    heads: int = size_key()
    kv_heads: int = size_key()
    head_dim: int = size_key()
    value_dim: int = size_key()
    scale: float = number_key(above=0)
    window: int | None = size_key(None)
    chunk: int | None = size_key(None)
    softcap: float | None = number_key(None, above=0)
    sinks: str | None = tensor_key(None)
    shares: int | None = key_of("layer", None)
    temperature_beta: float | None = number_key(None)
    temperature_length: int | None = size_key(None)
    temperature_offset: int | None = size_key(None)

    @property
    def reach(self) -> int | None:
        """How many positions are seen at most, the own one included; None: all."""
        return self.window or self.chunk

    def weights(self, widths: Mapping[str, Width]) -> Iterator[Weight]:
        if self.sinks is not None:
            yield Weight(self.sinks, (self.heads,), VECTOR)

    def width(self, widths: Mapping[str, Width]) -> Width:
        self.need(self.heads % self.kv_heads == 0, f"heads that are a multiple of {self.kv_heads}", self.heads)
        self.need((self.k is None) == (self.v is None), "both k and v, or neither", "one")
        self.need((self.k is None) != (self.shares is None), "k and v, or shares", "both or neither")
        both = (self.temperature_beta is None) == (self.temperature_length is None)
        self.need(both, "temperature_beta and temperature_length, or neither", "one")
        alone = self.temperature_offset is not None and self.temperature_length is None
        self.need(not alone, "temperature_length beside temperature_offset", "none")
        self.need(self.window is None or self.chunk is None, "a window or a chunk", "both")
        for value, expected in (
            (self.q, self.heads * self.head_dim),
            (self.k, self.kv_heads * self.head_dim),
            (self.v, self.kv_heads * self.value_dim),
        ):
            if value is not None:
                got = self.vector(widths, value)
                self.need(got == expected, f"{expected} numbers in {value!r}", got)
        return self.heads * self.value_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate(Op):
    """dst = act(a) * b, or act(a) without b. If one of them is a single number, it multiplies all of the other.

    limit: first, a is clamped to at most limit, b to -limit … limit. act "silu" is a * sigmoid(alpha * a). shift is
    added to b. by_layer: b is `layers` times as wide as a, and layer n reads part n of it.

    act "xielu" (arXiv 2411.13010) has four numbers of its own, f32[1] each, and no b: with p = softplus(alpha_p) and
    n = beta + softplus(alpha_n) it is p a^2 + beta a for a > 0, otherwise n (exp(min(a, eps)) - 1 - a) + beta a.
    """

    name = "gate"
    a: str = value_key()
    b: str | None = value_key(None)
    act: str = choice_key(ACTIVATIONS)
    limit: float | None = number_key(None, above=0)
    alpha: float = number_key(1.0)
    shift: float = number_key(0.0)
    by_layer: bool = flag_key()
    alpha_p: str | None = tensor_key(None)
    alpha_n: str | None = tensor_key(None)
    beta: str | None = tensor_key(None)
    eps: str | None = tensor_key(None)

    def weights(self, widths: Mapping[str, Width]) -> Iterator[Weight]:
        for name in self.tensor_names():
            yield Weight(name, (1,), VECTOR)

    def width(self, widths: Mapping[str, Width]) -> Width:
        a, own = self.vector(widths, self.a), len(self.tensor_names())
        if self.act == "xielu":
            self.need(own == 4, "alpha_p, alpha_n, beta and eps, as act is 'xielu'", f"{own} of them")
            self.need(self.b is None, "no b, as act is 'xielu'", self.b)
        else:
            self.need(own == 0, "alpha_p, alpha_n, beta and eps beside the act 'xielu' alone", self.act)
        self.need(not self.by_layer or self.b is not None, "b, as by_layer is true", "none")
        if self.b is None:
            return a
        b = self.vector(widths, self.b)
        if self.by_layer:
            return a  # program.py has checked that b is `layers` times as wide
        self.need(a == b or 1 in (a, b), f"values of one width, or one of a single number: {a} in {self.a!r}", b)
        return max(a, b)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route(Op):
    """The `count` of `experts` experts that process a token, and their weights. weight: f32[experts, width of src].

    logits = weight src + bias. score: "softmax" over all, "sigmoid" of each, or "chosen": the logits themselves choose,
    and the weights are the softmax over the chosen ones. The experts with the highest score + select (f32[experts]) are
    chosen; with groups, only from the `top_groups` groups with the highest sum of their two best. Ties go to the lower
    number. The weights are the scores (without select); with `normalise` they are divided by max(sum + add, floor).
    Then they are multiplied by scale, and each by its expert_scale (f32[experts]).
    """

    name = "route"
    src: str = value_key()
    weight: str = tensor_key()
    experts: int = size_key()
    count: int = size_key()
    score: str = choice_key(SCORES)
    bias: str | None = tensor_key(None)
    select: str | None = tensor_key(None)
    groups: int | None = size_key(None)
    top_groups: int | None = size_key(None)
    normalise: bool = flag_key()
    add: float = number_key(0.0)
    floor: float = number_key(0.0)
    scale: float = number_key(1.0)
    expert_scale: str | None = tensor_key(None)

    def weights(self, widths: Mapping[str, Width]) -> Iterator[Weight]:
        yield Weight(self.weight, (self.experts, self.vector(widths, self.src)), ROUTER)
        for name in (self.bias, self.select, self.expert_scale):
            if name is not None:
                yield Weight(name, (self.experts,), VECTOR)

    def width(self, widths: Mapping[str, Width]) -> Width:
        self.vector(widths, self.src)
        self.need(self.count <= self.experts, f"a count of at most {self.experts}", self.count)
        self.need((self.groups is None) == (self.top_groups is None), "groups and top_groups, or neither", "one")
        if self.groups is not None and self.top_groups is not None:
            self.need(self.experts % self.groups == 0, f"groups that divide {self.experts}", self.groups)
            self.need(self.top_groups <= self.groups, f"at most {self.groups} top_groups", self.top_groups)
            room = self.top_groups * (self.experts // self.groups)
            self.need(self.experts // self.groups >= 2, "groups of at least two experts", self.experts // self.groups)
            self.need(self.count <= room, f"a count of at most {room}, the experts of top_groups", self.count)
        return Chosen(self.experts, self.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts(Op):
    """dst = sum over the chosen experts e of w_e * down_e( act(gate_e src) * up_e src ), with biases where given.

    gate, up: f32[experts, inner, width of src]; down: f32[experts, rows, inner]; biases: f32[experts, inner] twice, and
    f32[experts, rows]. act, limit, alpha and shift as in Gate. scale_input: w_e multiplies src instead of the result.
    """

    name = "experts"
    src: str = value_key()
    route: str = value_key()
    gate: str = tensor_key()
    up: str = tensor_key()
    down: str = tensor_key()
    inner: int = size_key()
    rows: int = size_key()
    act: str = choice_key(ACTIVATIONS)
    gate_bias: str | None = tensor_key(None)
    up_bias: str | None = tensor_key(None)
    down_bias: str | None = tensor_key(None)
    limit: float | None = number_key(None, above=0)
    alpha: float = number_key(1.0)
    shift: float = number_key(0.0)
    scale_input: bool = flag_key()

    def weights(self, widths: Mapping[str, Width]) -> Iterator[Weight]:
        experts, cols = self._chosen(widths).experts, self.vector(widths, self.src)
        for name in (self.gate, self.up):
            yield Weight(name, (experts, self.inner, cols), STACK)
        yield Weight(self.down, (experts, self.rows, self.inner), STACK)
        for bias, size in ((self.gate_bias, self.inner), (self.up_bias, self.inner), (self.down_bias, self.rows)):
            if bias is not None:
                yield Weight(bias, (experts, size), VECTOR)

    def width(self, widths: Mapping[str, Width]) -> Width:
        self.vector(widths, self.src)
        self._chosen(widths)
        _refuse_xielu(self, self.act)
        return self.rows

    def _chosen(self, widths: Mapping[str, Width]) -> Chosen:
        chosen = widths[self.route]
        if not isinstance(chosen, Chosen):
            refuse(str(self), f"chosen experts in {self.route!r}", "a vector")
        return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Add(Op):
    """dst = a + scale * b."""

    name = "add"
    a: str = value_key()
    b: str = value_key()
    scale: float = number_key(1.0)

    def width(self, widths: Mapping[str, Width]) -> Width:
        a, b = self.vector(widths, self.a), self.vector(widths, self.b)
        self.need(a == b, f"values of one width: {a} in {self.a!r}", b)
        return a


@dataclass(frozen=True, slots=True, kw_only=True)
class Concat(Op):
    """dst = for each of `heads` heads its numbers of a, then its numbers of b."""

    name = "concat"
    a: str = value_key()
    b: str = value_key()
    heads: int = size_key()

    def width(self, widths: Mapping[str, Width]) -> Width:
        sizes = self.vector(widths, self.a), self.vector(widths, self.b)
        for size in sizes:
            self.need(size % self.heads == 0, f"heads that divide {size}", self.heads)
        return sum(sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale(Op):
    """dst = factor * src, times weight (f32[1]) where there is one."""

    name = "scale"
    src: str = value_key()
    factor: float = number_key(1.0)
    weight: str | None = tensor_key(None)

    def weights(self, widths: Mapping[str, Width]) -> Iterator[Weight]:
        if self.weight is not None:
            yield Weight(self.weight, (1,), VECTOR)

    def width(self, widths: Mapping[str, Width]) -> Width:
        return self.vector(widths, self.src)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conv(Op):
    """dst_t[c] = act( sum over j < taps of weight[c, j] * src_(t - taps + 1 + j)[c] + bias[c] ).

    src is zero before the start. weight: f32[width of src, taps]; bias: f32[width of src]. State of a sequence: src of
    the last taps - 1 positions.
    """

    name = "conv"
    src: str = value_key()
    weight: str = tensor_key()
    taps: int = size_key()
    bias: str | None = tensor_key(None)
    act: str = choice_key(ACTIVATIONS, "identity")

    def weights(self, widths: Mapping[str, Width]) -> Iterator[Weight]:
        cols = self.vector(widths, self.src)
        yield Weight(self.weight, (cols, self.taps), KERNEL)
        if self.bias is not None:
            yield Weight(self.bias, (cols,), VECTOR)

    def width(self, widths: Mapping[str, Width]) -> Width:
        _refuse_xielu(self, self.act)
        return self.vector(widths, self.src)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta(Op):
    """The gated delta rule: linear attention with a state S of [key_dim, value_dim] a value head, zero at the start.

    src: queries and keys of key_heads heads, then values of value_heads heads. q and k are divided by
    sqrt(sum of squares + 1e-6), q also by sqrt(key_dim). Value head j reads key head
    floor(j * key_heads / value_heads). By value head, decay = exp(-exp(a_log) * softplus(a + dt_bias)) and
    beta = sigmoid(b); then S = decay * S; S = S + k outer (beta * (v - S^T k)); dst = S^T q.
    a_log, dt_bias: f32[value_heads].
    """

    name = "delta"
    src: str = value_key()
    a: str = value_key()
    b: str = value_key()
    a_log: str = tensor_key()
    dt_bias: str = tensor_key()
    key_heads: int = size_key()
    value_heads: int = size_key()
    key_dim: int = size_key()
    value_dim: int = size_key()

    def weights(self, widths: Mapping[str, Width]) -> Iterator[Weight]:
        for name in (self.a_log, self.dt_bias):
            yield Weight(name, (self.value_heads,), VECTOR)

    def width(self, widths: Mapping[str, Width]) -> Width:
        divides = self.value_heads % self.key_heads == 0
        self.need(divides, f"value_heads that are a multiple of {self.key_heads}", self.value_heads)
        whole = 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim
        for value, expected in ((self.src, whole), (self.a, self.value_heads), (self.b, self.value_heads)):
            got = self.vector(widths, value)
            self.need(got == expected, f"{expected} numbers in {value!r}", got)
        return self.value_heads * self.value_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan(Op):
    """The state space of Mamba 2: a state S of [state_dim, head_dim] a head, zero at the start.

    src: x of `heads` heads, then B and C of `groups` groups. Head j reads B and C of group floor(j * groups / heads).
    By head, t = softplus(dt + dt_bias), clamped to dt_min … dt_max; then S = exp(-exp(a_log) * t) * S;
    S = S + B outer (t * x); dst = S^T C + d * x. a_log, dt_bias, d: f32[heads]. Dao and Gu, arXiv 2405.21060.
    """

    name = "scan"
    src: str = value_key()
    dt: str = value_key()
    a_log: str = tensor_key()
    dt_bias: str = tensor_key()
    d: str = tensor_key()
    heads: int = size_key()
    head_dim: int = size_key()
    groups: int = size_key()
    state_dim: int = size_key()
    dt_min: float = number_key(0.0)
    dt_max: float | None = number_key(None, above=0)

    def weights(self, widths: Mapping[str, Width]) -> Iterator[Weight]:
        for name in (self.a_log, self.dt_bias, self.d):
            yield Weight(name, (self.heads,), VECTOR)

    def width(self, widths: Mapping[str, Width]) -> Width:
        self.need(self.heads % self.groups == 0, f"heads that are a multiple of {self.groups}", self.heads)
        in_order = 0 <= self.dt_min <= (self.dt_min if self.dt_max is None else self.dt_max)
        self.need(in_order, "0 <= dt_min <= dt_max", f"{self.dt_min} and {self.dt_max}")
        whole = self.heads * self.head_dim + 2 * self.groups * self.state_dim
        for value, expected in ((self.src, whole), (self.dt, self.heads)):
            got = self.vector(widths, value)
            self.need(got == expected, f"{expected} numbers in {value!r}", got)
        return self.heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip(Op):
    """dst = src clamped to -limit … limit."""

    name = "clip"
    src: str = value_key()
    limit: float = number_key(above=0)

    def width(self, widths: Mapping[str, Width]) -> Width:
        return self.vector(widths, self.src)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hadamard(Op):
    """dst = H src / sqrt(block), where H[i, j] is -1 to the number of common bits of i and j; so for each `block`
    neighbours of src.

    block: a power of two. The op is its own inverse, so a matrix whose rows went through it gives, behind it, the
    products of the plain one.
    """

    name = "hadamard"
    src: str = value_key()
    block: int = size_key()

    def width(self, widths: Mapping[str, Width]) -> Width:
        whole = self.vector(widths, self.src)
        fits = self.block.bit_count() == 1 and whole % self.block == 0
        self.need(fits, f"a block that is a power of two and divides {whole}", self.block)
        return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Logits(Op):
    """dst = scale * (weight src + bias), then c * tanh(dst / c) with a softcap c.

    weight: f32[rows, width of src]; bias: f32[rows].
    """

    name = "logits"
    src: str = value_key()
    weight: str = tensor_key()
    rows: int = size_key()
    bias: str | None = tensor_key(None)
    scale: float = number_key(1.0)
    softcap: float | None = number_key(None, above=0)

    def weights(self, widths: Mapping[str, Width]) -> Iterator[Weight]:
        yield Weight(self.weight, (self.rows, self.vector(widths, self.src)), MATRIX)
        if self.bias is not None:
            yield Weight(self.bias, (self.rows,), VECTOR)

    def width(self, widths: Mapping[str, Width]) -> Width:
        self.vector(widths, self.src)
        return self.rows


def _refuse_xielu(op: Op, act: str) -> None:
    op.need(act != "xielu", "another act: 'xielu' has tensors, which only gate names", repr(act))


Recurrent = Conv | Delta | Scan
"""The ops with a state of fixed size in each sequence."""

_ALL = (
    *(Embed, Norm, Linear, Rope, Attention, Gate, Route, Experts, Add, Concat, Scale),
    *(Conv, Delta, Scan, Clip, Hadamard, Logits),
)
OPS: Mapping[str, type[Op]] = {op.name: op for op in _ALL}
