"""One tensor and its rule to a ClusteredMatrix and its statistics. Runs the steps in order; each step has its own
module.

Everything runs in the caller's thread, and the kernels release the GIL. Several tensors can be clustered in several
threads; the bytes do not depend on their number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rkf.cluster import affine, assign, calibrated, exceptions, figures, grid, histogram, kmeans
from rkf.cluster.assign import U8
from rkf.cluster.compensate import Objective
from rkf.cluster.histogram import Histogram
from rkf.cluster.recipe import Rule
from rkf.errors import SourceError
from rkf.format import bitpack
from rkf.format.constants import index_bits
from rkf.format.matrix import F32, ClusteredMatrix, DenseTensor, Exceptions

# Factors and centroids are fitted in turn; a third round lowers the squared error by less than 0.1 %.
_ROUNDS = 2
_ROWS = 4096  # rows assigned to an objective at a time; that takes 30 bytes a weight


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


def cluster(
    tensor: DenseTensor,
    rule: Rule,
    name: str,
    objective: Objective | None = None,
    exact_rows: NDArray[np.int64] | None = None,
) -> tuple[ClusteredMatrix | DenseTensor, dict[str, float]]:
    """Cluster one tensor by its rule; returns it with statistics of the loss.

    With an `objective`, the indices minimise the error of the layer's outputs on a calibration text
    (`rkf.cluster.calibrated`); centroids, factors and exact weights are those of clustering without data. With factors
    by group, weights keep their nearest centroids. The rows `exact_rows` stay exact under any rule.

    A tensor of one dimension, a tensor of one value, and a tensor that the rule calls dense are returned unchanged,
    without statistics. A matrix whose every table has at most k distinct values is stored losslessly under any rule.
    Statistics: `relative_error` (squared error / squared weights) and `entropy_bits` (per index). Raises SourceError
    for NaN or infinite weights, dense or not.
    """
    weights = tensor.decode().reshape(-1, tensor.shape[-1])
    if not histogram.is_finite(weights):
        raise SourceError(f"{name}: NaN or infinite weights; expected finite ones: the checkpoint is damaged")
    k = rule.k
    if k is None or tensor.data.ndim < 2 or histogram.few_distinct(weights, 1) is not None:
        return tensor, {}
    total = figures.squares(weights)
    rows_per_table = min(rule.rows_per_table or len(weights), len(weights))
    blocks = [slice(start, start + rows_per_table) for start in range(0, len(weights), rows_per_table)]
    exact = None
    if tables := _lossless([weights[block] for block in blocks], k):
        rule = replace(rule, grid=False, affine="none", group=None)
    else:
        positions = exceptions.largest(weights, rule.exceptions, exact_rows)
        kept = weights.copy()
        kept.reshape(-1)[positions] = np.nan
        tables = [_fit(weights[block], kept[block], rule, k, tensor.dtype) for block in blocks]
        del kept  # memory should not hold the largest matrix twice
        if objective is not None and rule.affine != "group":
            tables = _suited(weights, positions, tables, objective)
        exact = exceptions.exact(weights, positions, tensor.dtype) if positions.size else None
    stats = {"relative_error": sum(table.squared_error for table in tables) / total}
    return _assemble(tensor, tables, rows_per_table, exact, rule, stats)


def _lossless(blocks: list[F32], k: int) -> list[_Table]:
    """A table of its distinct values for each block of rows; empty if one has more than k."""
    tables = []
    for weights in blocks:
        values = histogram.few_distinct(weights, k)
        if values is None:
            return []
        tables.append(_nearest(weights, weights, kmeans.fill(values, k), _no_scale(weights), weights.shape[1]))
    return tables


def _fit(weights: F32, kept: F32, rule: Rule, k: int, dtype: str) -> _Table:
    """Centroids, factors and indices of one table's rows; `kept` is `weights` with NaN in place of exact weights."""
    group = rule.group or weights.shape[1]
    if rule.affine in ("none", "tensor"):
        found = histogram.of_weights(kept, _no_scale(kept), group)
        centroids, unit = _centroids(found.merged() if dtype == "f32" else found, rule, k)
        return _nearest(weights, kept, centroids, _no_scale(kept) * np.float32(unit), group)
    scale = affine.first_guess(kept, group)
    for _ in range(_ROUNDS):
        centroids, unit = _centroids(histogram.of_weights(kept, scale, group).merged(), rule, k)
        scale = affine.rounded(scale * np.float32(unit), "f32")
        indices = assign.nearest(kept, centroids, scale, group)
        scale = affine.rounded(affine.least_squares(kept, indices, centroids, scale, group), rule.affine_dtype)
    return _nearest(weights, kept, centroids, scale, group)


def _suited(weights: F32, positions: NDArray[np.int64], tables: list[_Table], objective: Objective) -> list[_Table]:
    """The tables with indices chosen for the objective. positions: those of the exact weights."""
    made, first = [], 0
    for table in tables:
        indices, error = np.empty_like(table.indices), 0.0
        for start in range(0, len(indices), _ROWS):
            rows = slice(start, min(start + _ROWS, len(indices)))
            part = weights[first + rows.start : first + rows.stop]
            exact = exceptions.mask(positions, part.shape, first + rows.start)
            indices[rows] = calibrated.suited(part, exact, table.centroids, table.scale[rows], objective)
            kept = np.where(exact, np.float32(np.nan), part)
            error += figures.squared_error(kept, indices[rows], table.centroids, table.scale[rows], part.shape[1])
        made.append(_Table(table.centroids, indices, table.scale, error))
        first += len(indices)
    return made


def _centroids(found: Histogram, rule: Rule, k: int) -> tuple[F32, float]:
    if rule.bits is not None:
        return grid.even(found, k, rule.bits)
    return grid.centroids(found, k) if rule.grid else (kmeans.centroids(found, k), 1.0)


def _no_scale(weights: F32) -> F32:
    return np.ones((len(weights), 1), np.float32)


def _nearest(weights: F32, kept: F32, centroids: F32, scale: F32, group: int) -> _Table:
    indices = assign.nearest(weights, centroids, scale, group)
    return _Table(centroids, indices, scale, figures.squared_error(kept, indices, centroids, scale, group))


def _assemble(
    tensor: DenseTensor,
    tables: list[_Table],
    rows_per_table: int,
    exact: Exceptions | None,
    rule: Rule,
    stats: dict[str, float],
) -> tuple[ClusteredMatrix, dict[str, float]]:
    centroids = np.stack([table.centroids for table in tables])
    k = centroids.shape[1]
    counts = np.stack([figures.counts(table.indices, k) for table in tables])
    matrix = ClusteredMatrix(
        shape=tensor.shape,
        planes=bitpack.pack(np.concatenate([table.indices for table in tables]), index_bits(k)),
        counts=counts,
        centroids=centroids,
        rows_per_table=rows_per_table,
        source_dtype=tensor.dtype,
        affine=affine.stored(np.concatenate([table.scale for table in tables]), rule, one_table=len(tables) == 1),
        exceptions=exact,
    )
    return matrix, {**stats, "entropy_bits": figures.entropy_bits(counts)}
