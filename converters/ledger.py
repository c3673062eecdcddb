"""The sizes of a conversion, tensor by tensor: measured after it, or predicted before any weight is read.

A prediction is a dry run: the writer gets blank tensors of the right shapes, and its bytes are counted but not kept.
The prediction is exact unless a matrix turns out to be special (a single value, at most k distinct values, or factors
or exact weights outside the range of f16), which only its weights can show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkf.cluster import affine
from rkf.cluster.recipe import Rule
from rkf.converters.source import TensorSpec
from rkf.file.writer import Writer
from rkf.format.constants import index_bits, plane_bits, position_bytes, row_bytes
from rkf.format.matrix import ClusteredMatrix, DenseTensor, Exceptions, Tensor, storage_dtype


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One tensor. stored_as: "K=16", a dense dtype, or "= target". source_bytes, bytes: in the source and in the file,
    without padding.
    """

    name: str
    stored_as: str
    weights: int
    source_bytes: int
    bytes: int
    stats: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ledger:
    """Every tensor of a conversion, and the whole file. file_bytes: with tokenizer, directory and padding. left_out:
    parts of the checkpoint that are not converted. notes: see Source.
    """

    rows: tuple[LedgerRow, ...]
    file_bytes: int
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def source_bytes(self) -> int:
        return sum(row.source_bytes for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the whole file over all weights."""
        return 8 * self.file_bytes / sum(row.weights for row in self.rows)

    @property
    def clustered_bytes(self) -> int:
        """Planes, values and positions of the clustered tensors."""
        return sum(row.bytes for row in self._clustered)

    @property
    def clustered_bits_per_weight(self) -> float:
        """Bits of the clustered tensors over their weights; 0 if there are none."""
        return 8 * self.clustered_bytes / max(1, sum(row.weights for row in self._clustered))

    @property
    def _clustered(self) -> list[LedgerRow]:
        return [row for row in self.rows if row.stored_as.startswith("K=")]

    def lines(self) -> Iterator[str]:
        """A table for people; its last line is the total."""
        width = max(len(row.name) for row in self.rows)
        yield f"{'tensor':{width}} {'as':>8} {'weights':>12} {'source bytes':>14} {'bytes':>14}"
        for row in self.rows:
            yield f"{row.name:{width}} {row.stored_as:>8} {row.weights:>12,} {row.source_bytes:>14,} {row.bytes:>14,}"
        weights = sum(row.weights for row in self.rows)
        yield (
            f"{'whole file':{width}} {'':>8} {weights:>12,} {self.source_bytes:>14,} {self.file_bytes:>14,}"
            f" = {self.bits_per_weight:.3f} bits per weight"
        )


def row(name: str, spec: TensorSpec, tensor: Tensor, stats: Mapping[str, float] | None = None) -> LedgerRow:
    """The line of a stored tensor."""
    if isinstance(tensor, DenseTensor):
        return LedgerRow(name, tensor.dtype, spec.weights, spec.stored_bytes, tensor.data.nbytes)
    if isinstance(tensor, ClusteredMatrix):
        size = _clustered_bytes(tensor)
        return LedgerRow(name, f"K={tensor.k}", spec.weights, spec.stored_bytes, size, stats or {})
    return LedgerRow(name, f"= {tensor.target}", 0, 0, 0)


def blank(spec: TensorSpec, rule: Rule, exact_rows: int = 0) -> Tensor:
    """A tensor of zeros with exactly the sizes that clustering by this rule gives. Its zero pages take no memory.

    exact_rows: the number of rows that stay exact, beside the rule's share.
    """
    if rule.k is None or len(spec.shape) < 2:
        return DenseTensor(spec.dtype, np.zeros(spec.shape, storage_dtype(spec.dtype)))
    columns = spec.shape[-1]
    rows = spec.weights // columns
    rows_per_table = min(rule.rows_per_table or rows, rows)
    tables = -(-rows // rows_per_table)
    groups = -(-columns // (rule.group or columns))
    experts = prod(spec.shape[:-2])
    exact = experts * int(rule.exceptions * (spec.weights // experts)) + exact_rows * columns
    dtype = "f16" if spec.dtype == "f32" else spec.dtype
    positions = np.arange(exact, dtype=f"<u{position_bytes(spec.weights)}")
    return ClusteredMatrix(
        shape=spec.shape,
        planes=tuple(np.zeros((rows, row_bytes(columns, bits)), np.uint8) for bits in plane_bits(index_bits(rule.k))),
        counts=np.zeros((tables, rule.k), np.uint64),
        centroids=np.tile(np.arange(rule.k, dtype=np.float32), (tables, 1)),
        rows_per_table=rows_per_table,
        source_dtype=spec.dtype,
        affine=affine.stored(np.ones((rows, groups), np.float32), rule, one_table=tables == 1),
        exceptions=Exceptions(positions, np.zeros(exact, storage_dtype(dtype)), dtype) if exact else None,
    )


class Rehearsal(Writer):
    """A Writer that counts its bytes and keeps none. file_bytes: known after the `with`."""

    @property
    def file_bytes(self) -> int:
        return self._counter.position

    @contextmanager
    def _output(self) -> Iterator[Any]:
        self._counter = _Counter()
        yield self._counter


class _Counter:
    """The part of an output file that a section writer needs."""

    position = 0

    def write(self, data: Any) -> None:
        self.position += memoryview(data).nbytes

    def overwrite_start(self, data: bytes) -> None:
        pass


def _clustered_bytes(matrix: ClusteredMatrix) -> int:
    arrays: list[NDArray[Any]] = [*matrix.planes, matrix.counts, matrix.centroids]
    if matrix.affine is not None:
        arrays += [factor for factor in (matrix.affine.a, matrix.affine.b) if factor is not None]
    if matrix.exceptions is not None:
        arrays += [matrix.exceptions.positions, matrix.exceptions.values]
    return sum(array.nbytes for array in arrays)
