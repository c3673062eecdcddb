"""The ops of mixtures of experts; ops.py has the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rkf.format.fields import refuse
from rkf.model.op import (
    ACTIVATIONS,
    ROUTER,
    STACK,
    VECTOR,
    Chosen,
    Op,
    Weight,
    Width,
    choice_key,
    flag_key,
    number_key,
    refuse_xielu,
    size_key,
    tensor_key,
    value_key,
)

SCORES = ("softmax", "sigmoid", "chosen")


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
        refuse_xielu(self, self.act)
        return self.rows

    def _chosen(self, widths: Mapping[str, Width]) -> Chosen:
        chosen = widths[self.route]
        if not isinstance(chosen, Chosen):
            refuse(str(self), f"chosen experts in {self.route!r}", "a vector")
        return chosen
