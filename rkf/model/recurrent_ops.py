"""The ops that keep a state of fixed size in each sequence; ops.py has the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rkf.model.op import (
    ACTIVATIONS,
    KERNEL,
    VECTOR,
    Op,
    Weight,
    Width,
    choice_key,
    number_key,
    refuse_xielu,
    size_key,
    tensor_key,
    value_key,
)


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
        refuse_xielu(self, self.act)
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


Recurrent = Conv | Delta | Scan
"""The ops with a state of fixed size in each sequence."""
