"""One process's share of a tensor that several processes divide: some of its rows or columns. Knows no program.

Planes are cut as views of the mapped file where rows stay together, so a process reads only the pages of its share.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rkf.errors import UnsupportedError
from rkf.format.constants import plane_bits
from rkf.format.matrix import Affine, ClusteredMatrix, DenseTensor, Exceptions

I64 = NDArray[np.int64]


class Share(NamedTuple):
    """axis: of the tensor's shape, which so many processes divide equally; None: the first process has the tensor, the
    others zeros.
    """

    axis: int | None
    processes: int

    def of(self, tensor: DenseTensor | ClusteredMatrix, number: int) -> DenseTensor | ClusteredMatrix:
        """The share of process `number`. UnsupportedError: its tables or factors do not end where shares do."""
        if isinstance(tensor, DenseTensor):
            if self.axis is None:
                return tensor if number == 0 else DenseTensor(tensor.dtype, np.zeros_like(tensor.data))
            return DenseTensor(tensor.dtype, np.ascontiguousarray(tensor.data[self._index(tensor.shape, number)]))
        if self.axis is None:
            raise UnsupportedError("a clustered tensor in place of a vector")
        if self.axis == len(tensor.shape) - 1:
            return self._columns(tensor, number)
        return self._rows(tensor, number)

    def _index(self, shape: tuple[int, ...], number: int) -> tuple[slice, ...]:
        size = shape[self.axis or 0] // self.processes
        return (*[slice(None)] * (self.axis or 0), slice(number * size, (number + 1) * size))

    def _shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(size // self.processes if axis == self.axis else size for axis, size in enumerate(shape))

    def _columns(self, matrix: ClusteredMatrix, number: int) -> ClusteredMatrix:
        shape = self._shape(matrix.shape)
        low, high = number * shape[-1], (number + 1) * shape[-1]
        if any(low * width % 8 or high * width % 8 for width in plane_bits(matrix.bits)):
            raise UnsupportedError(f"{shape[-1]} columns end within a byte of a plane")
        planes = tuple(
            plane[:, low * width // 8 : high * width // 8]
            for plane, width in zip(matrix.planes, plane_bits(matrix.bits), strict=True)
        )
        affine = matrix.affine
        if affine is not None and affine.group is not None:
            if low % affine.group or high % affine.group:
                raise UnsupportedError(f"{shape[-1]} columns end within a group of {affine.group}")
            groups = np.s_[:, low // affine.group : high // affine.group]
            affine = _factors(affine, groups)
        rows, columns = _places(matrix)
        kept = (columns >= low) & (columns < high)
        exceptions = _exceptions(matrix, kept, rows * shape[-1] + columns - low)
        return replace(matrix, shape=shape, planes=planes, affine=affine, exceptions=exceptions)

    def _rows(self, matrix: ClusteredMatrix, number: int) -> ClusteredMatrix:
        shape = self._shape(matrix.shape)
        rows = np.arange(matrix.rows).reshape(matrix.shape[:-1])[self._index(matrix.shape[:-1], number)].reshape(-1)
        tables = rows // matrix.rows_per_table
        each = int(np.searchsorted(tables, tables[0], "right"))  # rows of the first table
        if (tables - tables[0] != np.arange(len(rows)) // each).any():
            raise UnsupportedError(f"{len(rows)} rows end within one of the tables of centroids")
        used = slice(int(tables[0]), int(tables[-1]) + 1)
        chosen: slice | I64 = slice(int(rows[0]), int(rows[-1]) + 1) if self.axis == 0 else rows
        affine = matrix.affine
        if affine is not None and affine.granularity != "tensor":
            affine = _factors(affine, chosen)
        new = np.full(matrix.rows, -1)
        new[rows] = np.arange(len(rows))
        before, columns = _places(matrix)
        return ClusteredMatrix(
            shape=shape,
            planes=tuple(plane[chosen] for plane in matrix.planes),
            counts=matrix.counts[used],  # of the whole tables: no product reads them
            centroids=matrix.centroids[used],
            rows_per_table=each,
            source_dtype=matrix.source_dtype,
            affine=affine,
            exceptions=_exceptions(matrix, new[before] >= 0, new[before] * matrix.columns + columns),
        )


def _places(matrix: ClusteredMatrix) -> tuple[I64, I64]:
    """Rows and columns of the exceptions."""
    positions = np.empty(0, np.int64) if matrix.exceptions is None else matrix.exceptions.positions.astype(np.int64)
    rows, columns = np.divmod(positions, matrix.columns)
    return rows, columns


def _exceptions(matrix: ClusteredMatrix, kept: NDArray[np.bool_], positions: I64) -> Exceptions | None:
    exact = matrix.exceptions
    if exact is None or not kept.any():
        return None
    return Exceptions(positions[kept].astype(exact.positions.dtype), exact.values[kept], exact.dtype)


def _factors(affine: Affine, chosen: slice | I64 | tuple[slice, slice]) -> Affine:
    a, b = (None if factor is None else factor[chosen] for factor in (affine.a, affine.b))
    return replace(affine, a=a, b=b)
