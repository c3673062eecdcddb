"""One tensor and its rule to a ClusteredMatrix and its figures: the order of the steps. The steps are the neighbours'
business.

Everything runs in one thread with the GIL released in the kernels: a caller clusters several tensors in threads, and
the bytes do not depend on how many.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rkf import bitpack
from rkf.cluster import affine, assign, calibrated, exceptions, figures, grid, histogram, kmeans
from rkf.cluster.assign import U8
from rkf.cluster.compensate import Objective
from rkf.cluster.histogram import Histogram
from rkf.cluster.recipe import Rule
from rkf.errors import SourceError
from rkf.format import index_bits
from rkf.matrix import F32, ClusteredMatrix, DenseTensor

# Factors and centroids are fitted in turn; a third round gains less than 0.1 % of the squared error.
_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class _Table:
    """What one list of centroids makes of its rows. scale: f32[rows, groups], all 1 where there is no factor."""

    centroids: F32
    indices: U8
    scale: F32


def cluster(
    tensor: DenseTensor, rule: Rule, name: str, objective: Objective | None = None
) -> tuple[ClusteredMatrix | DenseTensor, dict[str, float]]:
    """Cluster one tensor by its rule; returns it with figures about the loss.

    With an `objective` the indices, and the values of the weights that stay exact, serve the layer's outputs on a
    calibration text (`rkf.cluster.calibrated`); centroids and factors are those of clustering without data. Factors by
    group keep the nearest centroids.

    A tensor of one dimension, of one value, or whose rule says dense comes back as it is, with no figures. A matrix
    whose every table has at most k distinct values is lossless, whatever else the rule says. Figures: `relative_error`
    (squared error / squared weights) and `entropy_bits` (of an index). Raises SourceError for NaN or infinite weights,
    dense or not.
    """
    weights = np.atleast_2d(tensor.decode()).reshape(-1, tensor.shape[-1])
    if not histogram.is_finite(weights):
        raise SourceError(f"{name}: NaN or infinite weights; expected finite ones: the checkpoint is damaged")
    if rule.k is None or tensor.data.ndim < 2 or histogram.few_distinct(weights, 1) is not None:
        return tensor, {}
    rows = weights.shape[0]
    rows_per_table = min(rule.rows_per_table or rows, rows)
    blocks = [slice(start, start + rows_per_table) for start in range(0, rows, rows_per_table)]
    if tables := _lossless(weights, blocks, rule.k):
        rule = replace(rule, grid=False, affine="none", group=None, exceptions=0.0)
    exact = exceptions.largest(weights, rule.exceptions)
    if not tables:
        kept = weights.copy()
        kept.reshape(-1)[exact] = np.nan
        tables = [_fit(weights[block], kept[block], rule, tensor.dtype) for block in blocks]
        if objective is not None and rule.affine != "group":
            tables, weights = _suited(weights, np.isnan(kept), tables, objective)
    return _assemble(tensor, weights, tables, rows_per_table, exact, rule)


def _lossless(weights: F32, blocks: list[slice], k: int) -> list[_Table]:
    """A table of its distinct values for each block of rows, or nothing where one has more than k."""
    tables = []
    for block in blocks:
        values = histogram.few_distinct(weights[block], k)
        if values is None:
            return []
        rows = weights[block]
        tables.append(_assigned(rows, kmeans.fill(values, k), _no_scale(rows), rows.shape[1]))
    return tables


def _fit(weights: F32, kept: F32, rule: Rule, dtype: str) -> _Table:
    """Centroids, factors and indices of one table's rows; `kept` is `weights` with NaN where one stays exact."""
    columns = weights.shape[1]
    if rule.affine in ("none", "tensor"):
        found = histogram.of_weights(kept, _no_scale(kept), columns)
        centroids, unit = _centroids(found.merged() if dtype == "f32" else found, rule)
        return _assigned(weights, centroids, _no_scale(kept) * np.float32(unit), columns)
    group = rule.group or columns
    scale = affine.first_guess(kept, group)
    for _ in range(_ROUNDS):
        centroids, unit = _centroids(histogram.of_weights(kept, scale, group).merged(), rule)
        scale = scale * np.float32(unit)
        indices = assign.nearest(kept, centroids, scale, group)
        scale = affine.rounded(affine.least_squares(kept, indices, centroids, scale, group), rule.affine_dtype)
    return _assigned(weights, centroids, scale, group)


def _suited(
    weights: F32, free: NDArray[np.bool_], tables: list[_Table], objective: Objective
) -> tuple[list[_Table], F32]:
    """The tables with indices that suit the objective, and the weights with those that are free moved."""
    made, moved, start = [], [], 0
    for table in tables:
        rows = slice(start, start := start + len(table.indices))
        indices, block = calibrated.suited(weights[rows], free[rows], table.centroids, table.scale, objective)
        made.append(replace(table, indices=indices))
        moved.append(block)
    return made, np.concatenate(moved)


def _centroids(found: Histogram, rule: Rule) -> tuple[F32, float]:
    return grid.centroids(found, rule.k) if rule.grid else (kmeans.centroids(found, rule.k), 1.0)


def _no_scale(weights: F32) -> F32:
    return np.ones((weights.shape[0], 1), np.float32)


def _assigned(weights: F32, centroids: F32, scale: F32, group: int) -> _Table:
    return _Table(centroids, assign.nearest(weights, centroids, scale, group), scale)


def _assemble(
    tensor: DenseTensor, weights: F32, tables: list[_Table], rows_per_table: int, exact: NDArray[np.int64], rule: Rule
) -> tuple[ClusteredMatrix, dict[str, float]]:
    indices = np.concatenate([table.indices for table in tables]) if len(tables) > 1 else tables[0].indices
    centroids = np.stack([table.centroids for table in tables])
    scale = np.concatenate([table.scale for table in tables])
    counts = np.stack([figures.counts(table.indices, rule.k) for table in tables])
    error = figures.relative_error(
        weights, indices, centroids, rows_per_table, scale, rule.group or weights.shape[1], exact
    )
    matrix = ClusteredMatrix(
        shape=tensor.shape,
        planes=bitpack.pack(indices, index_bits(rule.k)),
        counts=counts,
        centroids=centroids,
        rows_per_table=rows_per_table,
        source_dtype=tensor.dtype,
        affine=affine.stored(scale, rule, one_table=len(tables) == 1),
        exceptions=exceptions.exact(weights, exact, tensor.dtype) if exact.size else None,
    )
    return matrix, {"relative_error": error, "entropy_bits": figures.entropy_bits(counts)}
