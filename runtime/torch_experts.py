"""The ops Route and Experts as torch modules (rkf/model/ops.py says what they compute). Know no files.

Routing is f32. Only experts that some token goes to are decoded, each once for all of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from rkf.model.ops import Experts, Route
from rkf.runtime.torch_gate import gated
from rkf.runtime.torch_pass import TorchPass
from rkf.runtime.torch_tensors import TorchTensors

_SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "softmax": partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
    "chosen": lambda logits: logits,
}


class ExpertChoice(NamedTuple):
    """The routes of tokens. experts: i64[sequences, tokens, count]; weights: f32 of the same shape."""

    experts: Tensor
    weights: Tensor


class TorchRoute(nn.Module):
    """src: [sequences, tokens, width] -> the experts of each token, best first."""

    def __init__(self, op: Route, tensors: TorchTensors) -> None:
        super().__init__()
        self._op = op
        self.weight, self.bias = tensors.vector(op.weight), tensors.optional(op.bias)
        self.select, self.expert_scale = tensors.optional(op.select), tensors.optional(op.expert_scale)

    def forward(self, run: TorchPass, src: Tensor) -> ExpertChoice:
        op = self._op
        logits = functional.linear(src.float(), self.weight, self.bias)
        scores = _SCORES[op.score](logits)
        ranking = scores if self.select is None else scores + self.select
        if op.groups is not None and op.top_groups is not None:
            ranking = _of_best_groups(ranking, op.groups, op.top_groups)
        experts = _highest(ranking, op.count)
        weights = scores.gather(-1, experts)
        if op.score == "chosen":
            weights = weights.softmax(-1)
        if op.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + op.add).clamp(min=op.floor)
        weights = weights * op.scale
        return ExpertChoice(experts, weights if self.expert_scale is None else weights * self.expert_scale[experts])


class TorchExperts(nn.Module):
    """src: [sequences, tokens, width], and the routes -> [sequences, tokens, rows]."""

    def __init__(self, op: Experts, tensors: TorchTensors) -> None:
        super().__init__()
        self._op = op
        self.gate, self.up, self.down = (tensors.stack(name) for name in (op.gate, op.up, op.down))
        self.gate_bias, self.up_bias, self.down_bias = (
            tensors.optional(name, tensors.dtype) for name in (op.gate_bias, op.up_bias, op.down_bias)
        )

    def forward(self, run: TorchPass, src: Tensor, route: ExpertChoice) -> Tensor:
        x, weights = src.flatten(0, 1), route.weights.flatten()
        chosen = route.experts.flatten()  # place = token * count + number of the choice
        order = chosen.argsort(stable=True)
        total = x.new_zeros(len(x), self._op.rows, dtype=torch.float32)
        first = 0
        for expert, places in enumerate(chosen.bincount().tolist()):
            if places:
                mine = order[first : first + places]
                tokens, weight = mine // route.experts.shape[-1], weights[mine, None]
                total.index_add_(0, tokens, self._expert(expert, x[tokens], weight))
                first += places
        return total.to(src.dtype).view(*src.shape[:2], -1)

    def _expert(self, expert: int, x: Tensor, weight: Tensor) -> Tensor:
        """The weighted output of one expert for its tokens: f32[tokens, rows]."""
        op = self._op
        if op.scale_input:
            x = (x * weight).to(x.dtype)
        a = _biased(self.gate(x, expert), self.gate_bias, expert)
        b = _biased(self.up(x, expert), self.up_bias, expert)
        inner = gated(a, b, op.act, op.limit, op.alpha, op.shift)
        result = _biased(self.down(inner, expert), self.down_bias, expert).float()
        return result if op.scale_input else result * weight


def _biased(x: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    return x if bias is None else x + bias[expert]


def _of_best_groups(ranking: Tensor, groups: int, count: int) -> Tensor:
    """Minus infinity for experts outside the `count` groups with the highest sum of their two best."""
    grouped = ranking.unflatten(-1, (groups, -1))
    best = _highest(grouped.topk(2, dim=-1).values.sum(-1), count)
    kept = torch.zeros(*best.shape[:-1], groups, dtype=torch.bool, device=best.device).scatter(-1, best, True)
    return grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)


def _highest(values: Tensor, count: int) -> Tensor:
    """Indices of the highest values, highest first. Ties go to the lower index, which topk does not guarantee."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
