"""The ops of a program: what each reads, writes and computes, and the tensors it names (spec/program.md, section 5).

Knows no file, no runtime and no family of models. Mixtures and ops with a state have files of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rkf.model.mixture_ops import Experts, Route
from rkf.model.op import (
    ACTIVATIONS,
    EMBEDDING,
    MATRIX,
    STACK,
    VECTOR,
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
from rkf.model.recurrent_ops import Conv, Delta, Scan

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


_ALL = (
    *(Embed, Norm, Linear, Rope, Attention, Gate, Route, Experts, Add, Concat, Scale),
    *(Conv, Delta, Scan, Clip, Hadamard, Logits),
)
OPS: Mapping[str, type[Op]] = {op.name: op for op in _ALL}
