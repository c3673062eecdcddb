"""The objects passed from disk to kernels: a dense tensor, a clustered matrix, an alias. Knows no file and no model.

Arrays may be read-only views of a mapped file. `bf16` data is held as uint16 with its dtype name beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkf.format import bitpack
from rkf.format.constants import index_bits

F32 = NDArray[np.float32]
_NUMPY: dict[str, np.dtype[Any]] = {"bf16": np.dtype("<u2"), "f16": np.dtype("<f2"), "f32": np.dtype("<f4")}


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype that holds values of a dense dtype (`bf16` -> uint16)."""
    return _NUMPY[dtype]


def to_f32(data: NDArray[Any], dtype: str) -> F32:
    """Values of a dense dtype as f32, exactly."""
    if dtype == "bf16":
        wide = data.astype(np.uint32)
        wide <<= 16  # in place, so that memory does not hold the largest matrix twice
        return wide.view(np.float32)
    return data.astype(np.float32, copy=False)


def from_f32(values: F32, dtype: str) -> NDArray[Any]:
    """f32 values rounded to a dense dtype, nearest even; finite values beyond its range become infinite."""
    if dtype == "bf16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = (bits >> 16) & 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        return rounded.astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype(_NUMPY[dtype])


def ascending(values: NDArray[np.floating]) -> F32:
    """Ascending values as strictly ascending f32: where two are equal, the later one becomes the next number."""
    rounded = values.astype(np.float32)
    for i in range(1, len(rounded)):
        rounded[i] = max(rounded[i], np.nextafter(rounded[i - 1], np.float32(np.inf)))
    return rounded


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """Unchanged values. data: storage dtype of `dtype`, in the tensor's shape."""

    dtype: str
    data: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def decode(self) -> F32:
        """`f32[shape]`, exact."""
        return to_f32(self.data, self.dtype)


@dataclass(frozen=True, slots=True)
class Alias:
    """Another name of a stored tensor (tied embeddings)."""

    target: str


@dataclass(frozen=True, slots=True)
class Affine:
    """w = a * centroid + b. A factor that is None is left out of the formula.

    granularity: "tensor", "row" or "group". a, b: f16 or f32 arrays of shape [1], [rows] or [rows, groups], where
    groups = ceil(cols / group) and the last group of a row may be short.
    """

    granularity: str
    group: int | None = None
    a: NDArray[Any] | None = None
    b: NDArray[Any] | None = None

    def spread(self, factor: NDArray[Any], columns: int) -> F32:
        """A factor as f32 that broadcasts over [rows, columns]."""
        values = factor.astype(np.float32)
        if self.group is not None:
            return np.repeat(values, self.group, axis=1)[:, :columns]
        return values[:, None]


@dataclass(frozen=True, slots=True)
class Exceptions:
    """Single weights that override the decoded value. positions: u32 or u64 [n], flat, ascending; values: [n]."""

    positions: NDArray[Any]
    values: NDArray[Any]
    dtype: str


@dataclass(frozen=True, slots=True)
class MatrixValues:
    """The part of a clustered tensor that is not ranks. exceptions: [n] in the storage dtype of `exceptions_dtype`."""

    centroids: F32
    affine: Affine | None = None
    exceptions: NDArray[Any] | None = None
    exceptions_dtype: str | None = None


@dataclass(frozen=True, slots=True)
class ClusteredMatrix:
    """A tensor as ranks and values. rows = product of all dimensions but the last, cols = the last.

    planes: tuple of u8[rows, row_bytes], most significant first (rkf.format.constants.plane_bits).
    centroids: f32[tables, k], strictly ascending; counts: u64[tables, k].
    Row r uses table r // rows_per_table. Indices count ranks: index i is the i-th smallest centroid.
    """

    shape: tuple[int, ...]
    planes: tuple[NDArray[np.uint8], ...]
    counts: NDArray[np.uint64]
    centroids: F32
    rows_per_table: int
    source_dtype: str
    affine: Affine | None = None
    exceptions: Exceptions | None = None

    @property
    def k(self) -> int:
        return self.centroids.shape[1]

    @property
    def bits(self) -> int:
        return index_bits(self.k)

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def values(self) -> MatrixValues:
        if self.exceptions is None:
            return MatrixValues(self.centroids, self.affine)
        return MatrixValues(self.centroids, self.affine, self.exceptions.values, self.exceptions.dtype)

    def indices(self) -> NDArray[np.uint8]:
        """The ranks, `u8[rows, cols]`."""
        return bitpack.unpack(self.planes, self.bits, self.columns)

    def decode(self) -> F32:
        """The weights, `f32[shape]`, by the normative formula: (a * centroid) + b, each rounded, then exceptions."""
        indices = self.indices()
        tables = np.arange(self.rows) // self.rows_per_table
        # An index past K is wrong but must not read past the table: tables are padded to 2^bits (as in the kernels).
        padded = np.zeros((self.centroids.shape[0], 1 << self.bits), np.float32)
        padded[:, : self.k] = self.centroids
        weights = padded[tables[:, None], indices]
        if self.affine is not None:
            with np.errstate(over="ignore"):  # the formula gives infinity; `rkf verify` refuses it
                if self.affine.a is not None:
                    weights *= self.affine.spread(self.affine.a, self.columns)
                if self.affine.b is not None:
                    weights += self.affine.spread(self.affine.b, self.columns)
        weights = weights.reshape(self.shape)
        if self.exceptions is not None:
            weights.reshape(-1)[self.exceptions.positions] = to_f32(self.exceptions.values, self.exceptions.dtype)
        return weights


Tensor = DenseTensor | ClusteredMatrix | Alias
