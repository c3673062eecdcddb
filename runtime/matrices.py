"""A container's matrices as the structs that kernels read, each with its kernel. All decisions are made once, at load.

The precision ladder: centroids on the integer grid -127..127 are exact in one byte; others become two bytes (16 bits);
a matrix that no fast kernel supports (factors by group, dense tensors, exact mode) is multiplied in f32.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rkf.format.constants import plane_bits
from rkf.format.matrix import ClusteredMatrix, DenseTensor, Exceptions, to_f32
from rkf.runtime import cpu_features
from rkf.runtime.structs import LANES, MATRIX, end_column

F32 = NDArray[np.float32]
GRID = 127
_TWO_BYTES = GRID * 256  # the largest centroid in 16 bits
_OVERREAD = 16  # kernels load row factors up to 16 at a time


@dataclass
class Kernels:
    """Names of the kernels that a matrix needs."""

    one: str
    many: str
    row: str


class Memory:
    """Arrays that structs point to, kept alive with them."""

    def __init__(self) -> None:
        self._held: list[NDArray] = []

    def hold(self, array: NDArray) -> int:
        """The address of an array, which now lives as long as this object."""
        array = np.ascontiguousarray(array)
        self._held.append(array)
        return array.ctypes.data

    def zeros(self, size: int) -> int:
        """Zeroed memory of `size` bytes, aligned to cache lines."""
        raw = np.zeros(size + 64, np.uint8)
        return self.hold(raw) + -raw.ctypes.data % 64

    def rows(self, address: int, rows: int, columns: int, stride: int) -> F32:
        """f32[rows, columns] at an address in this memory, `stride` bytes from one row to the next."""
        raw = np.ctypeslib.as_array((ctypes.c_ubyte * (rows * stride)).from_address(address))
        return np.ndarray((rows, columns), np.float32, raw, strides=(stride, 4))

    def copy(self, array: NDArray, address: int) -> None:
        """Copy an array's bytes to an address in this memory."""
        ctypes.memmove(address, array.ctypes.data, array.nbytes)


@dataclass
class Prepared:
    """A matrix struct (without kernel addresses) and the names of its kernels."""

    struct: NDArray = field(default_factory=lambda: np.zeros(1, MATRIX))
    kernels: Kernels = field(default_factory=lambda: Kernels("", "", ""))


def dense(tensor: DenseTensor, memory: Memory) -> Prepared:
    """A dense matrix, multiplied in f32."""
    prepared = Prepared(kernels=Kernels("f32", "f32", f"row:{tensor.dtype}"))
    m = prepared.struct[0]
    m["rows"], m["columns"] = np.prod(tensor.shape[:-1]), tensor.shape[-1]
    m["dense"] = memory.hold(tensor.data)
    return prepared


def clustered(matrix: ClusteredMatrix, memory: Memory, level: str | None) -> Prepared:
    """A clustered matrix: always its exact decode, and the fast product of a CPU level if wanted and possible."""
    prepared = Prepared(kernels=Kernels("f32", "f32", "row:clustered"))
    m = prepared.struct[0]
    m["rows"], m["columns"], m["rows_per_table"] = matrix.rows, matrix.columns, matrix.rows_per_table
    m["end"], m["ahead"] = end_column(matrix.columns), cpu_features.prefetch_bytes(level)
    end = int(m["end"])
    for i, (plane, width) in enumerate(zip(matrix.planes, plane_bits(matrix.bits), strict=True)):
        # Kernels read whole panels of rows, and whole steps of columns.
        missing = max(LANES - matrix.rows, 0), max(end * width // 8 - plane.shape[1], 0)
        rows = np.pad(plane, [(0, each) for each in missing]) if any(missing) else plane
        m[f"plane{i}"], m[f"stride{i}"], m[f"width{i}"] = memory.hold(rows), rows.shape[1], width
    _exact_values(matrix, m, memory)
    unit = None
    if level is not None and (matrix.affine is None or matrix.affine.granularity != "group"):
        unit = _fast_values(matrix, prepared, memory, level)
    if matrix.exceptions is not None:
        _exceptions(matrix, matrix.exceptions, m, memory, unit)
    return prepared


def _exact_values(matrix: ClusteredMatrix, m: NDArray, memory: Memory) -> None:
    padded = np.zeros((len(matrix.centroids), 1 << matrix.bits), np.float32)
    padded[:, : matrix.k] = matrix.centroids
    m["centroids"], m["centroid_bytes"] = memory.hold(padded), padded.strides[0]
    m["group"] = matrix.columns
    if matrix.affine is None:
        return
    if matrix.affine.granularity == "group":
        m["group"] = matrix.affine.group
    for name in ("a", "b"):
        factor = getattr(matrix.affine, name)
        if factor is not None:
            values = factor.astype(np.float32)
            m[name] = memory.hold(values)
            m[f"{name}_row"] = 0 if matrix.affine.granularity == "tensor" else values.nbytes // matrix.rows


def _fast_values(matrix: ClusteredMatrix, prepared: Prepared, memory: Memory, level: str) -> NDArray[np.float64]:
    """Lookup tables, row factors and kernel names; returns the fast path's value of each rank, `[tables, k]`, before
    factors.
    """
    m = prepared.struct[0]
    digits, units = _digits(matrix.centroids)
    signed = level == "neon"  # its dot product takes signed bytes; the others take one unsigned operand
    width, m["offset"] = str(matrix.bits), 0 if signed else -128
    if matrix.bits >= 7 and digits.shape[:2] == (1, 1) and (np.diff(digits) == 1).all():
        # Apart from an offset, ranks are the values: no lookup. With signed bytes, 8-bit ranks become rank - 128.
        width, m["offset"] = f"{width}i", digits[0, 0, 0] + (128 if signed and matrix.bits == 8 else 0)
    tables = _grouped_tables(digits) if level in ("avx2", "avxvnni") and matrix.k == 64 else None
    if tables is not None:
        width = "6g"
    else:
        tables = _tables(digits, matrix.bits, level)
    one = "far" if cpu_features.prefetches_far(level) else "one"
    prepared.kernels.one, prepared.kernels.many = f"{one}:{width}", f"many:{width}"
    m["table"], m["table_bytes"], m["digits"] = memory.hold(tables), tables.shape[-1], digits.shape[1]
    _row_factors(matrix, m, memory, units)
    weights = 256.0 ** np.arange(digits.shape[1])[::-1]
    return np.tensordot(weights, digits.astype(np.float64), (0, 1)) * units[:, None]


def _digits(centroids: F32) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Centroids as integers in base 256, most significant digit first, `[tables, digits, k]`, and a unit per table."""
    values = centroids.astype(np.float64)
    if (values == np.rint(values)).all() and np.abs(values).max() <= GRID:
        return values.astype(np.int64)[:, None, :], np.ones(len(values))
    units = np.maximum(np.abs(values).max(axis=1), np.finfo(np.float32).tiny) / _TWO_BYTES
    whole = np.rint(values / units[:, None]).astype(np.int64)
    high = (whole + 128) >> 8
    return np.stack([high, whole - 256 * high], axis=1), units


def _tables(digits: NDArray[np.int64], bits: int, level: str) -> NDArray[np.uint8]:
    """Lookup bytes (digit + 128, except for neon) in the layout of a level's kernels, `u8[tables, digits, bytes]`."""
    values = np.full((*digits.shape[:2], 1 << bits), 128, np.uint8)
    values[..., : digits.shape[-1]] = digits + 128
    if level == "portable":
        return values
    if level == "neon":  # whole registers of 16 with the values themselves
        return np.tile(values ^ 128, max(16 >> bits, 1))
    if level == "avx512":  # registers of 64 (weights_avx512.py)
        if bits == 8:
            return values
        parts = [values[..., 0::2], values[..., 1::2]] if bits in (1, 7) else [values]
        order = _ranks_by_index(part_bits := (parts[0].shape[-1] - 1).bit_length())
        return np.concatenate([np.tile(part[..., order], 64 >> part_bits) for part in parts], axis=-1)
    # avx2, avxvnni: registers of twice 16, one for each value of the bits below the first plane (int8_avx2.py)
    below = 1 << (bits - plane_bits(bits)[0]) if bits > 1 else 2
    parts = [values[..., low::below] for low in range(below)]
    return np.concatenate([np.tile(part, 32 // part.shape[-1]) for part in parts], axis=-1)


def _grouped_tables(digits: NDArray[np.int64]) -> NDArray[np.uint8] | None:
    """Lookup bytes of 64 values in groups of four (int8_avx2.py), in registers of twice 16, `u8[tables, 1, 96]`: the
    first value of each group, 4 * the kind of its distances from that, and the distances of each kind. None if a table
    has more than four kinds, or two digits.
    """
    if digits.shape[1] > 1:
        return None
    tables = []
    for values in digits[:, 0]:
        groups = values.reshape(16, 4)
        kinds, kind = np.unique(groups - groups[:, :1], axis=0, return_inverse=True)
        if len(kinds) > 4:
            return None
        distances = np.pad(kinds, ((0, 4 - len(kinds)), (0, 0)))
        tables.append(np.concatenate([np.tile(part, 2) for part in (groups[:, 0] + 128, 4 * kind, distances.ravel())]))
    return np.stack(tables)[:, None].astype(np.uint8)


def _ranks_by_index(bits: int) -> NDArray[np.int64]:
    """The rank at each index of a table whose lowest bits are those of the first plane."""
    first = plane_bits(bits)[0] if bits else 0
    index = np.arange(1 << bits)
    return (index & (1 << first) - 1) << bits - first | index >> first


def _row_factors(matrix: ClusteredMatrix, m: NDArray, memory: Memory, units: NDArray[np.float64]) -> None:
    """scale = a * unit and shift = b, by row or one for all rows."""
    a = np.ones(1, np.float32) if matrix.affine is None or matrix.affine.a is None else matrix.affine.a
    scale = a.reshape(-1).astype(np.float64)
    scale = scale * (units if len(units) == 1 else np.repeat(units, matrix.rows_per_table)[: matrix.rows])
    m["scale"], m["scale_step"] = _factor(scale, memory)
    if matrix.affine is not None and matrix.affine.b is not None:
        m["shift"], m["shift_step"] = _factor(matrix.affine.b.reshape(-1), memory)


def _factor(values: NDArray, memory: Memory) -> tuple[int, int]:
    """Address and stride in bytes; a single value is repeated with a stride of zero."""
    if len(values) == 1:
        return memory.hold(np.repeat(values, _OVERREAD).astype(np.float32)), 0
    return memory.hold(np.pad(values, (0, _OVERREAD)).astype(np.float32)), 4


def _exceptions(
    matrix: ClusteredMatrix, exceptions: Exceptions, m: NDArray, memory: Memory, fast: NDArray[np.float64] | None
) -> None:
    """Exceptions by row: the exact weights, and the corrections that a fast product must add."""
    positions = exceptions.positions.astype(np.int64)
    rows, columns = np.divmod(positions, matrix.columns)
    values = to_f32(exceptions.values, exceptions.dtype)
    m["exception_start"] = memory.hold(np.searchsorted(rows, np.arange(matrix.rows + 1)))
    m["exception_row"] = memory.hold(rows.astype(np.int32))
    m["exception_column"] = memory.hold(columns.astype(np.int32))
    m["exception_value"] = memory.hold(values)
    if fast is None:
        return
    a, b = _factors_of(matrix, rows)
    fast = np.pad(fast, ((0, 0), (0, (1 << matrix.bits) - matrix.k)))  # a damaged rank may exceed the centroids
    there = a * fast[rows // matrix.rows_per_table, _ranks_at(matrix, rows, columns)] + b
    m["exception_delta"] = memory.hold((values - there).astype(np.float32))


def _factors_of(matrix: ClusteredMatrix, rows: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
    """a and b of some rows (tensor or row granularity), f64."""
    factors = []
    for name, missing in (("a", 1.0), ("b", 0.0)):
        factor = None if matrix.affine is None else getattr(matrix.affine, name)
        flat = np.full(1, missing) if factor is None else factor.reshape(-1).astype(np.float64)
        factors.append(flat[rows if len(flat) > 1 else np.zeros_like(rows)])
    return factors[0], factors[1]


def _ranks_at(matrix: ClusteredMatrix, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ranks of single weights, read from the planes."""
    ranks = np.zeros(len(rows), np.int64)
    for plane, width in zip(matrix.planes, plane_bits(matrix.bits), strict=True):
        bit = columns * width
        ranks = (ranks << width) | ((plane[rows, bit >> 3] >> (bit & 7)) & ((1 << width) - 1))
    return ranks
