"""Tensors made from names, each with its weights, computed one by one without the project's decoder.

Knows the decode formula (rkf-1.md, sections 10 and 13), no file. Numbers come from BLAKE3 of a tensor's name, so they
do not depend on the version of a random generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from rkf.format import bitpack
from rkf.format.constants import index_bits, plane_bits
from rkf.format.matrix import (
    Affine,
    Alias,
    ClusteredMatrix,
    DenseTensor,
    Exceptions,
    MatrixValues,
    Tensor,
    from_f32,
    to_f32,
)

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


def stream(key: str, count: int) -> NDArray[np.uint32]:
    """`u32[count]` that depend only on the key."""
    return np.frombuffer(blake3(key.encode()).digest(length=4 * count), "<u4")


def uniform(key: str, shape: tuple[int, ...], low: float, high: float) -> F32:
    """`f32[shape]` from low to high."""
    unit = stream(key, prod(shape)).astype(np.float64) / 2**32
    return (low + (high - low) * unit).astype(np.float32).reshape(shape)


@dataclass(frozen=True)
class Described:
    """The form of the values: affine is (granularity, group, dtype of a, dtype of b), exceptions (count, dtype)."""

    affine: tuple[str, int | None, str | None, str | None] | None = None
    exceptions: tuple[int, str] | None = None
    ordered: bool = True


def make_values(seed: str, shape: tuple[int, ...], k: int, rows_per_table: int, how: Described) -> MatrixValues:
    rows, columns = prod(shape[:-1]), shape[-1]
    centroids = uniform(f"{seed} centroids", (-(-rows // rows_per_table), k), -1, 1)
    affine, exceptions, dtype = None, None, None
    if how.affine is not None:
        granularity, group, a, b = how.affine
        of = {"tensor": (1,), "row": (rows,), "group": (rows, -(-columns // (group or columns)))}[granularity]
        affine = Affine(
            granularity,
            group,
            None if a is None else from_f32(uniform(f"{seed} a", of, 0.5, 1.5), a),
            None if b is None else from_f32(uniform(f"{seed} b", of, -0.1, 0.1), b),
        )
    if how.exceptions is not None:
        count, dtype = how.exceptions
        exceptions = from_f32(uniform(f"{seed} exceptions", (count,), -9, 9), dtype)
    return MatrixValues(np.sort(centroids, axis=1) if how.ordered else centroids, affine, exceptions, dtype)


@dataclass(frozen=True)
class Golden:
    """A tensor and the weights that every reader must decode; for a clustered one also indices, `u8[rows, cols]`."""

    tensor: Tensor
    weights: F32
    indices: U8 | None = None


def dense(name: str, shape: tuple[int, ...], dtype: str, bits: Any = None) -> Golden:
    """Uniform numbers, or the bits given."""
    data = from_f32(uniform(name, shape, -2, 2), dtype) if bits is None else bits
    return Golden(DenseTensor(dtype, data), to_f32(data, dtype))


def clustered(name: str, shape: tuple[int, ...], k: int, rows_per_table: int | None = None, **how: Any) -> Golden:
    """Indices and values from the tensor's name; `how` as in Described."""
    indices = (stream(f"{name} ranks", prod(shape)) % k).astype(np.uint8).reshape(-1, shape[-1])
    rows_per_table = rows_per_table or len(indices)
    values = make_values(name, shape, k, rows_per_table, Described(**how))
    return assemble(shape, indices, rows_per_table, values)


def assemble(shape: tuple[int, ...], indices: U8, rows_per_table: int, values: MatrixValues) -> Golden:
    """A clustered tensor; its exceptions are spread evenly from the first weight to the last."""
    k, exceptions = values.centroids.shape[1], None
    if values.exceptions is not None and values.exceptions_dtype is not None:
        positions = np.linspace(0, indices.size - 1, len(values.exceptions)).astype(np.uint32)
        exceptions = Exceptions(positions, values.exceptions, values.exceptions_dtype)
    tables = [indices[row : row + rows_per_table] for row in range(0, len(indices), rows_per_table)]
    matrix = ClusteredMatrix(
        shape=shape,
        planes=bitpack.pack(indices, index_bits(k)),
        counts=np.array([np.bincount(table.reshape(-1), minlength=k) for table in tables], np.uint64),
        centroids=values.centroids,
        rows_per_table=rows_per_table,
        source_dtype="bf16",
        affine=values.affine,
        exceptions=exceptions,
    )
    return Golden(matrix, decode(matrix, indices), indices)


def decode(matrix: ClusteredMatrix, indices: U8) -> F32:
    """Section 10 of the spec, one weight at a time: numpy's f32 scalars round each operation."""
    rows, columns = indices.shape
    weights = np.empty((rows, columns), np.float32)
    for row in range(rows):
        table = matrix.centroids[row // matrix.rows_per_table]
        for column in range(columns):
            weight = table[indices[row, column]]
            if matrix.affine is not None:
                at = {"tensor": 0, "row": row, "group": (row, column // (matrix.affine.group or columns))}
                place = at[matrix.affine.granularity]
                if matrix.affine.a is not None:
                    weight = np.float32(matrix.affine.a[place]) * weight
                if matrix.affine.b is not None:
                    weight = weight + np.float32(matrix.affine.b[place])
            weights[row, column] = weight
    if matrix.exceptions is not None:
        weights.reshape(-1)[matrix.exceptions.positions] = to_f32(matrix.exceptions.values, matrix.exceptions.dtype)
    return weights.reshape(matrix.shape)


def coarser(golden: Golden, planes: int) -> Golden:
    """Section 13 of the spec: the tensor given by the first planes of a clustered one."""
    matrix = golden.tensor
    if not isinstance(matrix, ClusteredMatrix) or golden.indices is None:
        return golden
    shift = sum(plane_bits(matrix.bits)[planes:])
    if not shift:
        return golden
    tables = zip(matrix.counts.tolist(), matrix.centroids.tolist(), strict=True)
    table = np.array([merge(counts, centroids, 1 << shift) for counts, centroids in tables], np.float32)
    return replace(golden, weights=decode(replace(matrix, centroids=table), golden.indices >> shift))


def merge(counts: list[int], centroids: list[float], members: int) -> list[float]:
    """Count-weighted means of `members` centroids each, in f64. Plain loops: the built-in sum may compensate."""
    merged = []
    for first in range(0, len(centroids), members):
        total = weighted = plain = 0.0
        for count, centroid in list(zip(counts, centroids, strict=True))[first : first + members]:
            total += float(count)
            weighted += float(count) * centroid
            plain += centroid
        merged.append(weighted / total if total else plain / len(centroids[first : first + members]))
    return merged


def other_values(model: dict[str, Golden], seed: str, how: Callable[[ClusteredMatrix], Described]) -> dict[str, Golden]:
    """The model's tensors with other values for their ranks."""
    made = dict(model)
    for name, golden in model.items():
        matrix = golden.tensor
        if isinstance(matrix, ClusteredMatrix) and golden.indices is not None:
            values = make_values(f"{seed} {name}", matrix.shape, matrix.k, matrix.rows_per_table, how(matrix))
            made[name] = assemble(matrix.shape, golden.indices, matrix.rows_per_table, values)
    for name, golden in model.items():
        if isinstance(golden.tensor, Alias):
            made[name] = replace(golden, weights=made[golden.tensor.target].weights)
    return made
