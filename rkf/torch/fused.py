"""`fuse`: linear layers for inference on a GPU whose products decode in registers. Knows the kernels' arguments.

A `FusedLinear` shares the planes of the layer that it replaces and holds the rest in the kernels' form. It cannot be
trained, and later changes of the values do not reach it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rkf.format.constants import plane_bits
from rkf.torch import triton_kernels
from rkf.torch.clustered_layers import ClusteredLinear
from rkf.torch.weight import affine

_LANE = 8  # columns
_WORDS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}  # width of a plane's fields -> dtype that holds one lane

# Rows and lanes of a program, not tuned on a GPU yet. A matvec program loads 512 bytes of a row at once. A matmul
# program for up to 64 tokens takes 75 kB of shared memory for three stages of its tiles; GPUs have had that since 2020.
_MATVEC = {"BLOCK_R": 4, "BLOCK_L": 128, "BLOCK_E": 16}
_MATMUL = {"BLOCK_R": 64, "BLOCK_L": 16}
_TOKENS = (16, 32, 64)


def fuse(module: nn.Module) -> nn.Module:
    """Replace every ClusteredLinear below `module` by a FusedLinear, and return the module."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ClusteredLinear):
                setattr(parent, name, FusedLinear(child))
    return module


class FusedLinear(nn.Module):
    """y = x W^T + bias, like ClusteredLinear, but W is never in memory. x: [..., in_features]; y has its dtype.

    Sums are f32; products of several tokens round W to x's dtype. No gradients.
    """

    def __init__(self, layer: ClusteredLinear) -> None:
        super().__init__()
        weight = layer.weight
        self.in_features, self.out_features = weight.columns, weight.rows
        self._widths = (*plane_bits(weight.bits), 0, 0)[:3]
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
            "bias": None if layer.bias is None else layer.bias.detach(),
            "starts": starts.to(torch.int32),
            "columns_of": (weight.positions % weight.columns).to(torch.int32),
            "deltas": weight.exceptions - weight.by_rank(weight.positions).detach(),
        }.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        y = x.new_empty(len(flat), self.out_features)
        if len(flat) == 1:
            self._matvec(flat, y)
        elif len(flat):
            self._matmul(flat, y)
        return y.view(*x.shape[:-1], self.out_features)

    def _matvec(self, x: Tensor, y: Tensor) -> None:
        grid = (-(-self.out_features // _MATVEC["BLOCK_R"]),)
        triton_kernels.matvec[grid](
            x, y, *self._pointers(), self.out_features, self.in_features, *self._sizes(), **self._forms(), **_MATVEC
        )

    def _matmul(self, x: Tensor, y: Tensor) -> None:
        lanes = nn.functional.pad(x, (0, self._lanes * _LANE - self.in_features)).view(len(x), self._lanes, _LANE)
        block = next((size for size in _TOKENS if size >= len(x)), _TOKENS[-1])
        grid = (-(-self.out_features // _MATMUL["BLOCK_R"]), -(-len(x) // block))
        triton_kernels.matmul[grid](
            lanes.permute(2, 0, 1).contiguous(), y, *self._pointers(), len(x), self.out_features, *self._sizes(),
            **self._forms(), BLOCK_T=block, **_MATMUL,
        )  # fmt: skip

    def _pointers(self) -> list[Tensor]:
        """Pass any array in place of an absent one; the kernel does not read it."""
        names = ("plane0", "plane1", "plane2", "tables", "a", "b", "bias", "starts", "columns_of", "deltas")
        found = [getattr(self, name, None) for name in names]
        return [self.get_buffer("tables") if value is None else value for value in found]

    def _sizes(self) -> tuple[int, ...]:
        return self._lanes, self._groups, self._lanes_per_group, self._rows_per_table, self._most

    def _forms(self) -> dict[str, Any]:
        present = {f"HAS_{name.upper()}": getattr(self, name) is not None for name in ("a", "b", "bias")}
        widths = {f"W{i}": width for i, width in enumerate(self._widths)}
        return {**widths, **present, "enable_fp_fusion": True}  # sums may be fused; Triton 3.9 requires the flag


def _words(plane: Tensor, bits: int, lanes: int) -> Tensor:
    """A plane u8[rows, row_bytes] as words [rows, lanes]; copied only if its rows end inside a lane."""
    whole = nn.functional.pad(plane, (0, lanes * bits - plane.shape[1])) if lanes * bits > plane.shape[1] else plane
    return whole.view(_WORDS[bits])
