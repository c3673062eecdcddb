"""The Walsh-Hadamard transform of blocks in torch: the arithmetic of the op `hadamard`."""

from __future__ import annotations

import torch
from torch import Tensor


def transformed(x: Tensor, block: int) -> Tensor:
    """Each `block` neighbours of the last axis times H / sqrt(block), computed in f32 at least; its own inverse.

    x: [..., width] of any float dtype; block: a power of two that divides width.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y, distance = x.to(wide), 1
    while distance < block:
        a, b = y.unflatten(-1, (-1, 2, distance)).unbind(-2)
        y = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        distance *= 2
    return (y * block**-0.5).to(x.dtype)
