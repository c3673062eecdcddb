"""Activations and gates for the ops Gate and Experts (rkf/model/ops.py). Knows no weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


def xielu(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: Tensor, eps: Tensor) -> Tensor:
    """The activation of this name; its numbers are f32[1] each, and it is computed in f32."""
    a, p, n = x.float(), functional.softplus(alpha_p), beta + functional.softplus(alpha_n)
    return (torch.where(a > 0, p * a * a, n * (torch.expm1(torch.minimum(a, eps)) - a)) + beta * a).to(x.dtype)


def gated(
    a: Tensor, b: Tensor | None, act: str, limit: float | None = None, alpha: float = 1.0, shift: float = 0.0
) -> Tensor:
    """act(a) * (b + shift), both clamped by `limit` first; act(a) if b is None. "silu" is a * sigmoid(alpha * a)."""
    if limit is not None:
        a, b = a.clamp(max=limit), None if b is None else b.clamp(-limit, limit)
    a = a * torch.sigmoid(alpha * a) if act == "silu" and alpha != 1 else _ACTIVATIONS[act](a)
    if b is None:
        return a
    return a * (b + shift if shift else b)
