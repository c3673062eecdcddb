"""`ClusteredLinear`, `ClusteredEmbedding` and `ClusteredStack`: layers over a ClusteredWeight. Know products, no files.

A product decodes the matrix one tile of rows at a time, in the forward and again in the backward pass. There is never a
dense copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rkf.format.matrix import ClusteredMatrix
from rkf.torch.weight import ClusteredWeight

# Weights decoded at a time, 2 MB of f32. Smaller tiles make products slower: 512 tokens and 1536 x 576 weights at K =
# 32 take 11.5 ms in tiles of 2^17, 10.1 in tiles of 2^19.
_TILE_WEIGHTS = 1 << 19


class ClusteredLinear(nn.Module):
    """y = x W^T + bias, W: [out_features, in_features] clustered. x: [..., in_features] of any float dtype; tiles of W
    are rounded to it.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: ClusteredMatrix | ClusteredWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight if isinstance(weight, ClusteredWeight) else ClusteredWeight(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.in_features, self.out_features = self.weight.columns, self.weight.rows

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x, self.weight, 0, self.out_features, *self.weight.values)
        return y if self.bias is None else y + self.bias


class ClusteredStack(nn.Module):
    """Matrices of one shape, [n, out_features, in_features] clustered: (x, number) -> x times the transpose of one."""

    def __init__(self, weight: ClusteredMatrix | ClusteredWeight) -> None:
        super().__init__()
        self.weight = weight if isinstance(weight, ClusteredWeight) else ClusteredWeight(weight)
        _, self.out_features, self.in_features = self.weight.shape

    def forward(self, x: Tensor, number: int) -> Tensor:
        first = number * self.out_features
        y: Tensor = _Product.apply(x, self.weight, first, first + self.out_features, *self.weight.values)
        return y


class ClusteredEmbedding(nn.Module):
    """Rows of a clustered matrix: ids: i64[...] -> [..., embedding_dim], in the centroids' dtype."""

    def __init__(self, weight: ClusteredMatrix | ClusteredWeight) -> None:
        super().__init__()
        self.weight = weight if isinstance(weight, ClusteredWeight) else ClusteredWeight(weight)
        self.num_embeddings, self.embedding_dim = self.weight.rows, self.weight.columns

    def forward(self, ids: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.weight.gather(ids.reshape(-1)).view(*ids.shape, self.embedding_dim)
        # In training, each row is decoded once: a text repeats its tokens, and their gradients add up in the table.
        unique, place = torch.unique(ids, return_inverse=True)
        return nn.functional.embedding(place, self.weight.gather(unique))


class _Product(torch.autograd.Function):
    """x: [..., columns] times the transpose of rows first to last of a ClusteredWeight with these values: centroids, a,
    b.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: ClusteredWeight,
        first: int,
        last: int,
        centroids: Tensor,
        a: Tensor | None,
        b: Tensor | None,
    ) -> Tensor:
        ctx.weight, ctx.span = weight, (first, last)
        ctx.save_for_backward(x, centroids, a, b)
        flat = x.reshape(-1, weight.columns)
        y = x.new_empty(len(flat), last - first)
        for low, high in _tiles(weight, first, last):
            tile = weight.decode(low, high, (centroids, a, b)).to(x.dtype)
            torch.mm(flat, tile.T, out=y[:, low - first : high - first])
        return y.view(*x.shape[:-1], last - first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *values = ctx.saved_tensors
        first, last = ctx.span
        flat, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        gradient_x = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        leaves = tuple(
            None if value is None else value.detach().requires_grad_(wanted)
            for value, wanted in zip(values, ctx.needs_input_grad[4:], strict=True)
        )
        for low, high in _tiles(ctx.weight, first, last):
            with torch.enable_grad():
                tile = ctx.weight.decode(low, high, leaves)
            part = gradient[:, low - first : high - first]
            if gradient_x is not None:
                gradient_x.addmm_(part, tile.detach().to(x.dtype))
            if tile.requires_grad:
                tile.backward((part.T @ flat).to(tile.dtype))
        shaped = None if gradient_x is None else gradient_x.view(x.shape)
        return shaped, None, None, None, *(None if leaf is None else leaf.grad for leaf in leaves)


def _tiles(weight: ClusteredWeight, first: int, last: int) -> list[tuple[int, int]]:
    """Spans of rows that together cover rows first to last."""
    step = max(_TILE_WEIGHTS // weight.columns, 1)
    return [(low, min(low + step, last)) for low in range(first, last, step)]
