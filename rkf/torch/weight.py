"""A clustered matrix as a torch module: ranks in buffers, values in parameters. Knows how to decode rows, no product.

Decoding is the normative formula of spec/rkf-1.md, bit for bit, and differentiable in the values.
"""

from __future__ import annotations

from functools import cache, partial
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rkf.format.constants import index_bits, plane_bits, row_bytes
from rkf.format.matrix import ClusteredMatrix, to_f32
from rkf.format.values_layout import Clusters

Values = tuple[Tensor, Tensor | None, Tensor | None]  # centroids, a, b


class ClusteredWeight(nn.Module):
    """A matrix [rows, columns] as ranks and values, or a stack [n, rows / n, columns] as one matrix of all its rows.

    Buffers: plane0, plane1, …: u8[rows, row_bytes], most significant first; positions: i64[n], flat, ascending;
    exceptions: f32[n]. Parameters: centroids: f32[tables, k]; a, b: f32[1], [rows] or [rows, groups], or None. They
    keep their meaning in any float dtype, but only f32 decodes to the file's own weights.
    """

    positions: Tensor
    exceptions: Tensor
    a: nn.Parameter | None
    b: nn.Parameter | None

    def __init__(self, matrix: ClusteredMatrix) -> None:
        super().__init__()
        affine, exact = matrix.affine, matrix.exceptions
        positions = np.empty(0, np.int64) if exact is None else exact.positions.astype(np.int64)
        values = np.empty(0, np.float32) if exact is None else to_f32(exact.values, exact.dtype)
        self._describe(matrix.shape, matrix.k, matrix.rows_per_table, None if affine is None else affine.group)
        # The largest number in a row. `gather` reserves this many for each row, and so never asks a device for a count.
        self.most_exceptions = int(np.bincount(positions // self.columns, minlength=1).max())
        self._hold(
            [_owned(plane) for plane in matrix.planes],
            _owned(matrix.centroids),
            _factor(None if affine is None else affine.a),
            _factor(None if affine is None else affine.b),
            _owned(positions),
            _owned(values),
        )

    @classmethod
    def blank(cls, clusters: Clusters, most_exceptions: int) -> ClusteredWeight:
        """One of this description whose tensors are still to be loaded: they are on the device "meta"."""
        weight = cls.__new__(cls)
        nn.Module.__init__(weight)
        weight._describe(clusters.shape, clusters.k, clusters.rows_per_table, clusters.values.group)
        weight.most_exceptions = most_exceptions
        spec, factors = clusters.values, clusters.values.factors(clusters.rows, clusters.columns)
        widths = plane_bits(index_bits(clusters.k))
        empty = partial(torch.empty, dtype=torch.float32)  # whatever torch's default is
        with torch.device("meta"):
            weight._hold(
                [empty(clusters.rows, row_bytes(clusters.columns, width), dtype=torch.uint8) for width in widths],
                empty(clusters.tables, clusters.k),
                empty(factors) if spec.a else None,
                empty(factors) if spec.b else None,
                empty(clusters.exceptions, dtype=torch.int64),
                empty(clusters.exceptions),
            )
        return weight

    def _describe(self, shape: tuple[int, ...], k: int, rows_per_table: int, group: int | None) -> None:
        self.shape, self.rows, self.columns = shape, prod(shape[:-1]), shape[-1]
        self.k, self.bits, self.rows_per_table, self.group = k, index_bits(k), rows_per_table, group

    def _hold(
        self,
        planes: list[Tensor],
        centroids: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        positions: Tensor,
        exceptions: Tensor,
    ) -> None:
        for i, plane in enumerate(planes):
            self.register_buffer(f"plane{i}", plane)
        self.centroids = nn.Parameter(centroids)
        self.a, self.b = (None if factor is None else nn.Parameter(factor) for factor in (a, b))
        self.register_buffer("positions", positions)
        self.register_buffer("exceptions", exceptions)

    @property
    def planes(self) -> list[Tensor]:
        return [self.get_buffer(f"plane{i}") for i in range(len(plane_bits(self.bits)))]

    @property
    def values(self) -> Values:
        """The trainable values: centroids, a, b."""
        return self.centroids, self.a, self.b

    def ranks(self, rows: slice | Tensor) -> Tensor:
        """The indices of some rows, `u8[n, columns]`."""
        return unpack([plane[rows] for plane in self.planes], self.bits, self.columns)

    def forward(self) -> Tensor:
        """The whole matrix in its own shape."""
        return self.decode(0, self.rows).view(self.shape)

    def decode(self, first: int, last: int, values: Values | None = None) -> Tensor:
        """Rows first to last, `[last - first, columns]`, with these values or its own; differentiable in them."""
        rows = torch.arange(first, last, device=self.centroids.device)
        centroids, a, b = values or self.values
        # Only the tables of these rows: a stack has one for each of its matrices.
        table = first // self.rows_per_table
        centroids = centroids[table : (last - 1) // self.rows_per_table + 1]
        weights = self._looked_up(slice(first, last), rows, (centroids, a, b), table)
        begin, end = first * self.columns, last * self.columns
        low, high = torch.searchsorted(self.positions, torch.tensor([begin, end], device=rows.device)).tolist()
        if low == high:
            return weights
        places, exact = self.positions[low:high] - begin, self.exceptions[low:high].to(weights.dtype)
        weights.view(-1).index_copy_(0, places, exact)
        return weights

    def gather(self, rows: Tensor) -> Tensor:
        """Some rows in any order, `rows: i64[n]` -> `[n, columns]`; differentiable in the values."""
        weights = self._looked_up(rows, rows, self.values, 0)
        if not self.most_exceptions:
            return weights
        low = torch.searchsorted(self.positions, rows * self.columns)
        high = torch.searchsorted(self.positions, (rows + 1) * self.columns)
        place = low[:, None] + torch.arange(self.most_exceptions, device=rows.device)
        inside, place = place < high[:, None], place.clamp(max=len(self.positions) - 1)
        # In a row with fewer exceptions, the unused places go to a column that is cut off.
        columns = torch.where(inside, self.positions[place] % self.columns, self.columns)
        exact = self.exceptions[place].to(weights.dtype)
        return nn.functional.pad(weights, (0, 1)).scatter(1, columns, exact)[:, : self.columns]

    @torch.no_grad()
    def by_rank(self, positions: Tensor) -> Tensor:
        """The weights that ranks alone give, without exceptions. positions: i64[n], flat; returns f32[n]."""
        rows, columns = positions // self.columns, positions % self.columns
        index = torch.zeros_like(positions)
        for plane, width in zip(self.planes, plane_bits(self.bits), strict=True):
            fields = plane[rows, columns * width // 8] >> (columns * width % 8).to(torch.uint8)
            index = (index << width) | (fields & ((1 << width) - 1))
        group = columns // (self.group or self.columns)
        a, b = (
            factor if factor is None or factor.numel() == 1 else factor.view(self.rows, -1)[rows, group]
            for factor in (self.a, self.b)
        )
        return affine(self.centroids[rows // self.rows_per_table, index.clamp(max=self.k - 1)], a, b)

    def _looked_up(self, chosen: slice | Tensor, rows: Tensor, values: Values, table: int) -> Tensor:
        """(a * centroid) + b of the rows, each operation rounded: nothing here may be fused. The centroids in `values`
        are those of tables from `table` on.
        """
        centroids, a, b = values
        # An index past K is wrong but must not read past the table: tables are padded to 2^bits.
        tables = nn.functional.pad(centroids, (0, (1 << self.bits) - self.k))
        one = all(factor is None or factor.numel() == 1 for factor in (a, b))
        if one:  # the same operations on the tables give the same bits, once per rank instead of once per weight
            tables = affine(tables, a, b)
        planes = [plane[chosen] for plane in self.planes]
        weights = _Lookup.apply(tables, planes, self.columns, rows // self.rows_per_table - table)
        if one:
            return weights
        return affine(weights, *(None if factor is None else self._spread(factor, rows) for factor in (a, b)))

    def _spread(self, factor: Tensor, rows: Tensor) -> Tensor:
        """A factor in a shape that broadcasts over [len(rows), columns]."""
        if factor.ndim == 2:
            return factor[rows].repeat_interleave(self.group or self.columns, dim=1)[:, : self.columns]
        return factor if len(factor) == 1 else factor[rows][:, None]


def affine(x: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    """(a * x) + b, each operation rounded; a factor that is None is left out."""
    x = x if a is None else x * a
    return x if b is None else x + b


def unpack(planes: list[Tensor], bits: int, columns: int) -> Tensor:
    """Join planes `u8[rows, row_bytes]` into indices `u8[rows, columns]`, as in rkf.format.bitpack.unpack."""
    indices: Tensor | None = None
    below = bits
    for plane, width in zip(planes, plane_bits(bits), strict=True):
        below -= width
        spread = _fields(width, below, plane.device).index_select(0, plane.reshape(-1).to(torch.int32))
        fields = spread.view(torch.uint8).view(len(plane), -1)[:, :columns]
        indices = fields if indices is None else indices | fields
    if indices is None:
        raise ValueError("a matrix has at least one plane")
    return indices


@cache
def _fields(width: int, shift: int, device: torch.device) -> Tensor:
    """The fields of every byte, each shifted to its place in an index: [256] integers of 8 / width bytes, so that one
    lookup unpacks a byte. Shifts and masks over whole planes took 1.7 times as long for planes of [4, 1] bits.
    """
    places = torch.arange(0, 8, width, dtype=torch.uint8)
    fields = (torch.arange(256, dtype=torch.uint8)[:, None] >> places) & ((1 << width) - 1)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[len(places)]
    return (fields << shift).contiguous().view(whole).view(-1).to(device)


class _Lookup(torch.autograd.Function):
    """tables: [t, 2^bits], planes: u8[n, row_bytes] each, table: i64[n] -> [n, columns]. Its gradient is a weighted
    histogram. Torch's own gathers take three times as long forwards and twice backwards (docs/log.md).
    """

    @staticmethod
    def forward(ctx: Any, tables: Tensor, planes: list[Tensor], columns: int, table: Tensor) -> Tensor:
        ctx.planes, ctx.columns, ctx.table, ctx.shape = planes, columns, table, tables.shape
        if tables.shape[1] == 16 and tables.dtype == torch.float32:
            return _pairs(tables, planes[0], columns, table)
        flat = _flat_indices(tables.shape, planes, columns, table).to(torch.int32)
        out = tables.new_empty(len(table), columns)
        torch.index_select(tables.reshape(-1), 0, flat, out=out.view(-1))
        return out  # not a view: exceptions are written in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        flat = _flat_indices(ctx.shape, ctx.planes, ctx.columns, ctx.table)
        sums = torch.bincount(flat, gradient.reshape(-1), minlength=ctx.shape.numel())
        return sums.to(gradient.dtype).view(ctx.shape), None, None, None


def _pairs(tables: Tensor, plane: Tensor, columns: int, table: Tensor) -> Tensor:
    """The values of a 4-bit plane, looked up one byte at a time: half the lookups and no unpacking. f32[n, columns]"""
    low, high = tables.repeat(1, 16), tables.repeat_interleave(16, dim=1)
    pairs = torch.stack([low, high], dim=-1).view(torch.float64).view(-1)  # of 8 bytes, whatever they mean
    places = plane.to(torch.int32)
    if len(tables) > 1:
        places = places + (table * 256).to(torch.int32)[:, None]
    out = tables.new_empty(len(plane), 2 * plane.shape[1])
    torch.index_select(pairs, 0, places.view(-1), out=out.view(torch.float64).view(-1))
    return out if out.shape[1] == columns else out[:, :columns].contiguous()


def _flat_indices(shape: torch.Size, planes: list[Tensor], columns: int, table: Tensor) -> Tensor:
    """Where each weight's centroid lies in the flattened tables, u8 or i32[n * columns]."""
    ranks = unpack(planes, (shape[1] - 1).bit_length(), columns)
    if shape[0] > 1:
        ranks = ranks + (table * shape[1]).to(torch.int32)[:, None]
    return ranks.reshape(-1)


def _owned(array: NDArray[Any]) -> Tensor:
    """A copy: the file may be unmapped, and torch knows no read-only memory."""
    return torch.from_numpy(array.copy())


def _factor(values: NDArray[Any] | None) -> Tensor | None:
    return None if values is None else _owned(values.astype(np.float32))
