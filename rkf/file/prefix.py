"""Coarser matrices from a prefix of the rank planes (spec/rkf-1.md, section 13). Pure; knows no file.

The result is an ordinary clustered matrix with fewer centroids, so callers need no special case.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from rkf.format.constants import plane_bits
from rkf.format.matrix import F32, ClusteredMatrix


def within(matrix: ClusteredMatrix, bits: int) -> ClusteredMatrix:
    """The matrix of the planes that fit into `bits` bits a weight, at least the first one; see `coarser`."""
    return coarser(matrix, max(sum(total <= bits for total in accumulate(plane_bits(matrix.bits))), 1))


def coarser(matrix: ClusteredMatrix, planes: int) -> ClusteredMatrix:
    """The matrix of the first `planes` planes (1 or more), or the matrix itself if it has no more.

    Its centroids are the count-weighted means of the centroids that share a prefix. The centroids must ascend: do not
    use this under values whose order is "none".
    """
    dropped = sum(plane_bits(matrix.bits)[planes:])
    if not dropped:
        return matrix
    counts, centroids = merge(matrix.counts, matrix.centroids, 1 << dropped)
    return replace(matrix, planes=matrix.planes[:planes], counts=counts, centroids=centroids)


def merge(counts: NDArray[np.uint64], centroids: F32, members: int) -> tuple[NDArray[np.uint64], F32]:
    """Neighbours merged, `members` into one: `u64[tables, ceil(k / members)]`, f32 of the same shape.

    Sums are taken in f64 from left to right, as the specification requires (numpy's own sum adds in another order).
    If no weight has any of the merged ranks, the result is the plain mean.
    """
    merged = -(-centroids.shape[1] // members)
    total, weighted, plain, number = np.zeros((4, len(centroids), merged))
    occurring = np.zeros((len(centroids), merged), np.uint64)
    for member in range(members):
        count, centroid = counts[:, member::members], centroids[:, member::members].astype(np.float64)
        there = np.s_[:, : count.shape[1]]  # the last group may be short
        total[there] += count.astype(np.float64)
        weighted[there] += count.astype(np.float64) * centroid
        plain[there] += centroid
        number[there] += 1
        occurring[there] += count
    means = np.where(total > 0, weighted, plain) / np.where(total > 0, total, number)
    return occurring, means.astype(np.float32)
