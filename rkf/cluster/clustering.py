"""One tensor and its rule to a ClusteredMatrix and its statistics. Runs the steps in order; each step has its own
module.

The kernels release the GIL. Several tensors, or experts of a stack, can be clustered in several threads; the bytes do
not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkf.cluster import affine, assign, calibrated, exceptions, figures, grid, histogram, kmeans
from rkf.cluster.assign import U8
from rkf.cluster.compensate import Objective, Objectives
from rkf.cluster.histogram import Histogram
from rkf.cluster.recipe import Rule
from rkf.errors import SourceError
from rkf.format import bitpack
from rkf.format.constants import index_bits
from rkf.format.matrix import F32, ClusteredMatrix, DenseTensor, to_f32

# Factors and centroids are fitted in turn; a third round lowers the squared error by less than 0.1 %.
_ROUNDS = 2
_ROWS = 4096  # rows assigned to an objective at a time; that takes 30 bytes a weight

Clustered = tuple[ClusteredMatrix | DenseTensor, dict[str, float]]
"""A tensor in its stored form, with statistics."""


@dataclass(frozen=True, slots=True)
class _Table:
    """One list of centroids and its rows clustered with it.

    centroids: f32[k]; indices: u8[rows, cols]; scale: f32[rows, groups], all 1 where there is no factor.
    squared_error: over the rows, without the weights that stay exact.
    """

    centroids: F32
    indices: U8
    scale: F32
    squared_error: float


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A clustered matrix: the whole tensor, or one of a stack.

    planes: u8[rows, row_bytes] each; counts: u64[tables, k]; centroids: f32[tables, k]; scale: f32[rows, groups].
    positions: i64, flat, of the weights that stay exact; exact: f32, their values. total: the sum of squared weights.
    """

    planes: tuple[U8, ...]
    counts: NDArray[np.uint64]
    centroids: F32
    scale: F32
    positions: NDArray[np.int64]
    exact: F32
    squared_error: float
    total: float


class _Matrices:
    """The matrices of a tensor in f32: one, or those of a stack, which are decoded when asked for."""

    def __init__(self, tensor: DenseTensor) -> None:
        self._dtype = tensor.dtype
        rows = tensor.shape[-2] if tensor.data.ndim > 2 else -1
        self._stack = tensor.data.reshape(-1 if rows > 0 else 1, rows, tensor.shape[-1])
        self._only = to_f32(self._stack[0], tensor.dtype) if len(self._stack) == 1 else None

    def __len__(self) -> int:
        return len(self._stack)

    def __getitem__(self, number: int) -> F32:
        """f32[rows, cols]"""
        return to_f32(self._stack[number], self._dtype) if self._only is None else self._only

    def __iter__(self) -> Iterator[F32]:
        return (self[number] for number in range(len(self)))

    def taken(self, number: int) -> F32:
        """The same for the caller alone, to change and to free."""
        weights, self._only = self[number], None
        return weights.copy() if np.may_share_memory(weights, self._stack) else weights


def cluster(
    tensor: DenseTensor,
    rule: Rule,
    name: str,
    objective: Objectives | None = None,
    exact_rows: NDArray[np.int64] | None = None,
    each: Callable[..., Iterable[Any]] = map,
) -> Clustered:
    """Cluster one tensor by its rule; returns it with statistics of the loss.

    With an `objective`, the indices minimise the error of the layer's outputs on a calibration text
    (`rkf.cluster.calibrated`); centroids, factors and exact weights are those of clustering without data. With factors
    by group, weights keep their nearest centroids. The rows `exact_rows` stay exact under any rule.

    The matrices of a stack, [experts, rows, cols], are clustered one by one. Each has one table under any rule, its own
    share of exact weights and its own objective; only those in work are held in f32. each: maps over them, or over the
    rows of a single matrix with an objective; the `map` of a pool of threads works on several at a time.

    A tensor of one dimension, a tensor of one value, and a tensor that the rule calls dense are returned unchanged,
    without statistics. A matrix whose every table has at most k distinct values is stored losslessly under any rule.
    Statistics: `relative_error` (squared error / squared weights) and `entropy_bits` (per index). Raises SourceError
    for NaN or infinite weights, dense or not.
    """
    (found,) = cluster_alike([(tensor, rule, name)], objective, exact_rows, each)
    return found


def cluster_alike(
    tensors: Sequence[tuple[DenseTensor, Rule, str]],
    objective: Objectives | None = None,
    exact_rows: NDArray[np.int64] | None = None,
    each: Callable[..., Iterable[Any]] = map,
) -> list[Clustered]:
    """`cluster` for stacks that read the same inputs, such as the gates and ups of experts: expert by expert, so that
    each objective is made once.
    """
    tasks = [_Task.of(tensor, rule, name, exact_rows) for tensor, rule, name in tensors]
    working = [task for task in tasks if task is not None]

    count = max((len(task.matrices) for task in working), default=0)
    by_matrix, by_rows = (each, map) if count > 1 else (map, each)

    def clustered(number: int) -> list[_Matrix]:
        own = objective(number) if callable(objective) else objective
        return [task.clustered(number, own, by_rows) for task in working]

    made = list(by_matrix(clustered, range(count)))
    found: list[Clustered] = [(tensor, {}) for tensor, _, _ in tensors]
    for place, task in enumerate(working):
        found[tasks.index(task)] = _assemble(task.tensor, [matrices[place] for matrices in made], task.rows, task.rule)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """A tensor that is clustered matrix by matrix. rows: of a table; lossless: every table has at most k values."""

    tensor: DenseTensor
    matrices: _Matrices
    rule: Rule
    k: int
    rows: int
    lossless: bool
    exact_rows: NDArray[np.int64] | None

    @classmethod
    def of(cls, tensor: DenseTensor, rule: Rule, name: str, exact_rows: NDArray[np.int64] | None) -> _Task | None:
        """None: the tensor is stored unchanged. Raises SourceError."""
        matrices = _Matrices(tensor)
        if not all(map(histogram.is_finite, matrices)):
            raise SourceError(f"{name}: NaN or infinite weights; expected finite ones: the checkpoint is damaged")
        k = rule.k
        if k is None or tensor.data.ndim < 2 or _is_one_value(matrices):
            return None
        rows = len(matrices[0])
        rows = rows if tensor.data.ndim > 2 else min(rule.rows_per_table or rows, rows)
        lossless = all(_lossless(_blocks(weights, rows), k) for weights in matrices)
        if lossless:
            rule = replace(rule, grid=False, affine="none", group=None)
        return cls(tensor, matrices, rule, k, rows, lossless, exact_rows)

    def clustered(self, number: int, objective: Objective | None, each: Callable[..., Iterable[Any]]) -> _Matrix:
        weights = self.matrices.taken(number)
        if self.lossless:
            positions, tables = np.zeros(0, np.int64), _lossless(_blocks(weights, self.rows), self.k)
        else:
            positions = exceptions.largest(weights, self.rule.exceptions, self.exact_rows)
            tables = self._tables(weights, positions, objective, each)
        exact, total = weights.reshape(-1)[positions], figures.squares(weights)
        del weights  # of a table 1 GB
        return _packed(tables, positions, exact, total)

    def _tables(
        self,
        weights: F32,
        positions: NDArray[np.int64],
        objective: Objective | None,
        each: Callable[..., Iterable[Any]],
    ) -> list[_Table]:
        blocks = _blocks(weights, self.rows)
        with _left_out(weights, positions):
            fits = [_fit(block, self.rule, self.k, self.tensor.dtype) for block in blocks]
        if objective is not None and self.rule.affine != "group":
            return _suited(weights, positions, self.rows, fits, objective, each)
        group = self.rule.group or weights.shape[1]
        indices = [assign.nearest(block, *fit, group) for block, fit in zip(blocks, fits, strict=True)]
        with _left_out(weights, positions):
            return [
                _Table(centroids, chosen, scale, figures.squared_error(block, chosen, centroids, scale, group))
                for block, chosen, (centroids, scale) in zip(blocks, indices, fits, strict=True)
            ]


def _blocks(weights: F32, rows: int) -> list[F32]:
    return [weights[start : start + rows] for start in range(0, len(weights), rows)]


@contextmanager
def _left_out(weights: F32, positions: NDArray[np.int64]) -> Iterator[None]:
    """NaN in place of the weights at flat `positions`, which return at the end."""
    flat = weights.reshape(-1)
    values = flat[positions]
    flat[positions] = np.nan
    yield
    flat[positions] = values


def _is_one_value(matrices: _Matrices) -> bool:
    """Whether all weights are equal; told by the first two that differ."""
    values = {None if (found := histogram.few_distinct(each, 1)) is None else float(found[0]) for each in matrices}
    return len(values) == 1 and None not in values


def _lossless(blocks: list[F32], k: int) -> list[_Table]:
    """A table of its distinct values for each block of rows; empty if one has more than k."""
    tables = []
    for weights in blocks:
        values = histogram.few_distinct(weights, k)
        if values is None:
            return []
        centroids, scale = kmeans.fill(values, k), _no_scale(weights)
        tables.append(_Table(centroids, assign.nearest(weights, centroids, scale, weights.shape[1]), scale, 0.0))
    return tables


def _fit(weights: F32, rule: Rule, k: int, dtype: str) -> tuple[F32, F32]:
    """(Centroids f32[k], factors f32[rows, groups]) of one table's rows, with NaN in place of exact weights."""
    group = rule.group or weights.shape[1]
    if rule.affine in ("none", "tensor"):
        found = histogram.of_weights(weights, _no_scale(weights), group)
        centroids, unit = _centroids(found.merged() if dtype == "f32" else found, rule, k)
        return centroids, _no_scale(weights) * np.float32(unit)
    scale = affine.first_guess(weights, group)
    for _ in range(_ROUNDS):
        centroids, unit = _centroids(histogram.of_weights(weights, scale, group).merged(), rule, k)
        scale = affine.rounded(scale * np.float32(unit), "f32")
        indices = assign.nearest(weights, centroids, scale, group)
        scale = affine.rounded(affine.least_squares(weights, indices, centroids, scale, group), rule.affine_dtype)
    return centroids, scale


def _suited(
    weights: F32,
    positions: NDArray[np.int64],
    rows_per_table: int,
    fits: list[tuple[F32, F32]],
    objective: Objective,
    each: Callable[..., Iterable[Any]],
) -> list[_Table]:
    """Tables with indices chosen for the objective. positions: those of the exact weights; fits: (centroids, factors)
    of each table.
    """
    made = []
    for number, (centroids, scale) in enumerate(fits):
        first = number * rows_per_table
        indices = np.empty((len(scale), weights.shape[1]), np.uint8)

        def suit(
            start: int, first: int = first, centroids: F32 = centroids, scale: F32 = scale, indices: U8 = indices
        ) -> float:
            rows = slice(start, min(start + _ROWS, len(indices)))
            part = weights[first + rows.start : first + rows.stop]
            exact = exceptions.mask(positions, part.shape, first + rows.start)
            indices[rows] = calibrated.suited(part, exact, centroids, scale[rows], objective)
            kept = np.where(exact, np.float32(np.nan), part)
            return figures.squared_error(kept, indices[rows], centroids, scale[rows], part.shape[1])

        error = sum(each(suit, range(0, len(indices), _ROWS)))
        made.append(_Table(centroids, indices, scale, error))
    return made


def _centroids(found: Histogram, rule: Rule, k: int) -> tuple[F32, float]:
    if rule.bits is not None:
        return grid.even(found, k, rule.bits)
    return grid.centroids(found, k) if rule.grid else (kmeans.centroids(found, k), 1.0)


def _no_scale(weights: F32) -> F32:
    return np.ones((len(weights), 1), np.float32)


def _packed(tables: list[_Table], positions: NDArray[np.int64], exact: F32, total: float) -> _Matrix:
    """The tables of a matrix as they will be stored. positions, exact: of the weights that stay exact."""
    k = tables[0].centroids.size
    indices = tables[0].indices if len(tables) == 1 else np.concatenate([table.indices for table in tables])
    return _Matrix(
        planes=bitpack.pack(indices, index_bits(k)),
        counts=np.stack([figures.counts(table.indices, k) for table in tables]),
        centroids=np.stack([table.centroids for table in tables]),
        scale=np.concatenate([table.scale for table in tables]),
        positions=positions,
        exact=exact,
        squared_error=sum(table.squared_error for table in tables),
        total=total,
    )


def _assemble(
    tensor: DenseTensor, matrices: list[_Matrix], rows_per_table: int, rule: Rule
) -> tuple[ClusteredMatrix, dict[str, float]]:
    size = tensor.data.size // len(matrices)
    positions = np.concatenate([each.positions + number * size for number, each in enumerate(matrices)])
    exact = np.concatenate([each.exact for each in matrices])
    counts = np.concatenate([each.counts for each in matrices])
    scale = np.concatenate([each.scale for each in matrices])
    matrix = ClusteredMatrix(
        shape=tensor.shape,
        planes=tuple(np.concatenate(planes) for planes in zip(*(each.planes for each in matrices), strict=True)),
        counts=counts,
        centroids=np.concatenate([each.centroids for each in matrices]),
        rows_per_table=rows_per_table,
        source_dtype=tensor.dtype,
        affine=affine.stored(scale, rule, one_table=len(counts) == 1),
        exceptions=exceptions.exact(exact, positions, tensor.data.size, tensor.dtype) if positions.size else None,
    )
    error = sum(each.squared_error for each in matrices) / sum(each.total for each in matrices)
    return matrix, {"relative_error": error, "entropy_bits": figures.entropy_bits(counts)}
