"""Mean and variance of a matrix, from its centroids and the count of each. Knows one list of centroids, no model.

centroids: f64[k] by rank; counts: u64[k].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
F32 = NDArray[np.float32]
U64 = NDArray[np.uint64]
Change = Callable[[F64, U64, np.random.Generator], F64]
"""A change of one list by a study: (centroids, counts, random) -> the new values of the same ranks."""


def moments(centroids: F64, counts: U64) -> tuple[float, float]:
    """Mean and variance of the clustered weights."""
    shares = counts / counts.sum()
    mean = float(shares @ centroids)
    return mean, float(shares @ (centroids - mean) ** 2)


def matched(values: F64, centroids: F64, counts: U64) -> F64:
    """a * values + b, a > 0, with the mean and variance that the matrix has with `centroids`."""
    mean, variance = moments(centroids, counts)
    new_mean, new_variance = moments(values, counts)
    a = np.sqrt(variance / new_variance) if new_variance > 0 else 1.0
    return mean + a * (values - new_mean)


def centring(change: Change) -> Change:
    """The same change with the mean restored: b alone."""

    def centred(centroids: F64, counts: U64, random: np.random.Generator) -> F64:
        values = change(centroids, counts, random)
        return values + (moments(centroids, counts)[0] - moments(values, counts)[0])

    return centred


def matching(change: Change) -> Change:
    """The same change with mean and variance restored."""
    return lambda centroids, counts, random: matched(change(centroids, counts, random), centroids, counts)


def compared(values: F64, centroids: F64, counts: U64) -> tuple[float, float]:
    """Squared error of the weights relative to their variance, and their correlation with the old weights."""
    shares = counts / counts.sum()
    (mean, variance), (new_mean, new_variance) = moments(centroids, counts), moments(values, counts)
    error = float(shares @ (values - centroids) ** 2)
    covariance = float(shares @ ((values - new_mean) * (centroids - mean)))
    if min(variance, new_variance) <= 0:
        return 0.0, 1.0
    return error / variance, covariance / float(np.sqrt(variance * new_variance))
