"""Optimal 1-D k-means over a weighted histogram, by dynamic programming. Knows no tensor.

An optimal cluster is an interval of the sorted values. The cost of an interval obeys the quadrangle inequality, so the
best left end moves only to the right: O(k n log n) by divide and conquer (Wu 1991, "Optimal quantization by matrix
searching"; Grønlund et al. 2017, "Fast exact k-means in 1D", arXiv 1701.07204). No seed, no empty cluster.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rkf.cluster.histogram import F64, Histogram
from rkf.format.matrix import F32


def centroids(histogram: Histogram, k: int) -> F32:
    """The k centroids of least squared error, `f32[k]`, strictly ascending.

    If there are at most k distinct values, they are kept exactly and `fill` adds the rest.
    """
    values, mass = histogram.values, histogram.mass
    if values.size <= k:
        return fill(values.astype(np.float32), k)
    # Values are centred, so the prefix sums below lose no digits to a common offset. Not values @ mass: a threaded BLAS
    # adds in another order, and its second thread spun for a third of a conversion's CPU time.
    mean = np.sum(values * mass) / mass.sum()
    cuts = _optimal_cuts(mass, (values - mean) * mass, k)
    sums = np.add.reduceat(values * mass, cuts) / np.add.reduceat(mass, cuts)
    last = np.append(cuts[1:], values.size) - 1
    return np.clip(sums, values[cuts], values[last]).astype(np.float32)


def fill(values: F32, k: int) -> F32:
    """Ascending values extended to k by the next representable ones above the last, or below the first on overflow.

    If there are no values (every weight of a table stays exact), they start at 0.
    """
    filled = list(values) or [np.float32(0)]
    top = np.finfo(np.float32).max
    while len(filled) < k and filled[-1] < top:
        filled.append(np.nextafter(filled[-1], top))
    while len(filled) < k:
        filled.insert(0, np.nextafter(filled[0], np.float32(-np.inf)))
    return np.array(filled, np.float32)


@njit(cache=True, nogil=True)
def _optimal_cuts(mass: F64, sums: F64, k: int) -> NDArray[np.int64]:
    """The first index of each of k intervals with the greatest total of (interval sum)^2 / (interval mass): i64[k].

    This minimises the squared error, because the sum of squares is the same for any cuts. mass, sums: f64[n], n > k.
    """
    n = mass.size
    total = np.zeros(n + 1)
    weighted = np.zeros(n + 1)
    for i in range(n):
        total[i + 1] = total[i] + mass[i]
        weighted[i + 1] = weighted[i] + sums[i]

    gain = np.zeros(n + 1)  # gain[j]: the best for the first j values in the clusters so far
    for j in range(1, n + 1):
        gain[j] = weighted[j] ** 2 / total[j]
    left = np.zeros((k, n + 1), np.int32)  # left[layer, j]: start of the last of layer + 1 clusters over j values
    better = np.zeros(n + 1)
    for layer in range(1, k):
        starts = left[layer]
        first, last = layer + 1, n - (k - 1 - layer)  # every cluster before and after needs at least one value
        stride = 1
        while stride <= last - first + 1:
            stride *= 2
        while stride:  # every other multiple of the stride is known, and bounds the ones between
            for j in range(first - 1 + stride, last + 1, 2 * stride):
                low, high = layer, j - 1
                if j - stride >= first:
                    low = starts[j - stride]
                if j + stride <= last:
                    high = min(high, starts[j + stride])
                best, where = -1.0, low
                for i in range(low, high + 1):
                    value = gain[i] + (weighted[j] - weighted[i]) ** 2 / (total[j] - total[i])
                    if value > best:
                        best, where = value, i
                better[j], starts[j] = best, where
            stride //= 2
        gain, better = better, gain

    cuts = np.zeros(k, np.int64)
    end = n
    for layer in range(k - 1, 0, -1):
        end = left[layer, end]
        cuts[layer] = end
    return cuts
