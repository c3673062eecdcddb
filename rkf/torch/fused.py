"""`fuse`: linear layers for inference on a GPU whose products decode in registers. Knows the kernels' arguments.

A `FusedLinear` or `FusedStack` shares the planes of the layer that it replaces and holds the rest in the kernels' form.
It cannot be trained, and later changes of the values do not reach it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rkf.format.constants import plane_bits
from rkf.torch import triton_kernels
from rkf.torch.clustered_layers import ClusteredLinear, ClusteredStack
from rkf.torch.weight import ClusteredWeight, affine

_LANE = 8  # columns
_WORDS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}  # width of a plane's fields -> dtype that holds one lane

# Rows and lanes of a program, not tuned on a GPU yet. A matvec program loads 512 bytes of a row at once. A matmul
# program for up to 64 tokens takes 75 kB of shared memory for three stages of its tiles; GPUs have had that since 2020.
_MATVEC = {"BLOCK_R": 4, "BLOCK_L": 128, "BLOCK_E": 16}
_MATMUL = {"BLOCK_R": 64, "BLOCK_L": 16}
_TOKENS = (16, 32, 64)


def fuse(module: nn.Module) -> nn.Module:
    """Replace every ClusteredLinear and ClusteredStack below `module` by a fused one, and return the module."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ClusteredLinear):
                setattr(parent, name, FusedLinear(child))
            elif isinstance(child, ClusteredStack) and _by_tables(child):
                setattr(parent, name, FusedStack(child))
    return module


def _by_tables(stack: ClusteredStack) -> bool:
    """Whether every matrix of a stack begins with a table, or all share one."""
    weight = stack.weight
    return len(weight.centroids) == 1 or stack.out_features % weight.rows_per_table == 0


class _FusedProduct(nn.Module):
    """y = x W^T + bias for some rows of W, which is never in memory.

    Sums are f32; products of several tokens round W to x's dtype. No gradients.
    """

    def __init__(self, weight: ClusteredWeight, bias: Tensor | None) -> None:
        super().__init__()
        self._columns, self._widths = weight.columns, (*plane_bits(weight.bits), 0, 0)[:3]
        self._lanes, self._rows_per_table = -(-weight.columns // _LANE), weight.rows_per_table
        words = [_words(plane, bits, self._lanes) for plane, bits in zip(weight.planes, self._widths, strict=False)]
        tables = nn.functional.pad(weight.centroids.detach(), (0, (1 << weight.bits) - weight.k))
        a, b = (None if factor is None else factor.detach().view(len(factor), -1) for factor in (weight.a, weight.b))
        if all(factor is None or factor.numel() == 1 for factor in (a, b)):  # the same operations on the tables
            tables, a, b = affine(tables, a, b), None, None
        row_of = weight.positions // weight.columns
        starts = torch.searchsorted(row_of, torch.arange(weight.rows + 1, device=row_of.device))
        self._most = weight.most_exceptions
        factor = a if a is not None else b
        self._groups = 1 if factor is None else factor.shape[1]
        self._lanes_per_group = self._lanes if self._groups == 1 else (weight.group or 0) // _LANE
        for name, value in {
            **{f"plane{i}": part for i, part in enumerate(words)},
            "tables": tables,
            "a": a,
            "b": b,
            "bias": None if bias is None else bias.detach(),
            "starts": starts.to(torch.int32),
            "columns_of": (weight.positions % weight.columns).to(torch.int32),
            "deltas": weight.exceptions - weight.by_rank(weight.positions).detach(),
        }.items():
            self.register_buffer(name, value)

    def _product(self, x: Tensor, first: int, last: int) -> Tensor:
        """x: [..., columns] -> [..., last - first]. Row `first` begins a table, or there is one table."""
        flat = x.reshape(-1, self._columns)
        y = x.new_empty(len(flat), last - first)
        if len(flat) == 1:
            self._matvec(flat, y, first)
        elif len(flat):
            self._matmul(flat, y, first)
        return y.view(*x.shape[:-1], last - first)

    def _matvec(self, x: Tensor, y: Tensor, first: int) -> None:
        grid = (-(-y.shape[1] // _MATVEC["BLOCK_R"]),)
        triton_kernels.matvec[grid](
            x, y, *self._pointers(first), y.shape[1], self._columns, *self._sizes(), **self._forms(), **_MATVEC
        )

    def _matmul(self, x: Tensor, y: Tensor, first: int) -> None:
        lanes = nn.functional.pad(x, (0, self._lanes * _LANE - self._columns)).view(len(x), self._lanes, _LANE)
        block = next((size for size in _TOKENS if size >= len(x)), _TOKENS[-1])
        grid = (-(-y.shape[1] // _MATMUL["BLOCK_R"]), -(-len(x) // block))
        triton_kernels.matmul[grid](
            lanes.permute(2, 0, 1).contiguous(), y, *self._pointers(first), len(x), y.shape[1], *self._sizes(),
            **self._forms(), BLOCK_T=block, **_MATMUL,
        )  # fmt: skip

    def _pointers(self, first: int) -> list[Tensor]:
        """The kernels' arrays, those by row from row `first` on. Pass any array in place of an absent one; it is not
        read.
        """
        tables = self.get_buffer("tables")
        here = {"tables": first // self._rows_per_table if len(tables) > 1 else 0, "columns_of": 0, "deltas": 0}
        names = ("plane0", "plane1", "plane2", "tables", "a", "b", "bias", "starts", "columns_of", "deltas")
        found = {name: getattr(self, name, None) for name in names}
        return [tables if value is None else value[here.get(name, first) :] for name, value in found.items()]

    def _sizes(self) -> tuple[int, ...]:
        return self._lanes, self._groups, self._lanes_per_group, self._rows_per_table, self._most

    def _forms(self) -> dict[str, Any]:
        present = {f"HAS_{name.upper()}": getattr(self, name) is not None for name in ("a", "b", "bias")}
        widths = {f"W{i}": width for i, width in enumerate(self._widths)}
        return {**widths, **present, "enable_fp_fusion": True}  # sums may be fused; Triton 3.9 requires the flag


class FusedLinear(_FusedProduct):
    """A ClusteredLinear for inference. x: [..., in_features]; y has its dtype."""

    def __init__(self, layer: ClusteredLinear) -> None:
        super().__init__(layer.weight, layer.bias)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, 0, self.out_features)


class FusedStack(_FusedProduct):
    """A ClusteredStack for inference: (x: [..., in_features], number) -> [..., out_features], of x's dtype."""

    def __init__(self, stack: ClusteredStack) -> None:
        super().__init__(stack.weight, None)
        self.in_features, self.out_features = stack.in_features, stack.out_features

    def forward(self, x: Tensor, number: int) -> Tensor:
        first = number * self.out_features
        return self._product(x, first, first + self.out_features)


def _words(plane: Tensor, bits: int, lanes: int) -> Tensor:
    """A plane u8[rows, row_bytes] as words [rows, lanes]; copied only if its rows end inside a lane."""
    whole = nn.functional.pad(plane, (0, lanes * bits - plane.shape[1])) if lanes * bits > plane.shape[1] else plane
    return whole.view(_WORDS[bits])
