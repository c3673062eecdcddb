"""Tuning of values: trains centroids and affine factors to reproduce the source's outputs; ranks stay. Needs torch."""

import rkf.torch  # noqa: F401 - reports a missing torch in one line
from rkf.tune.tuning import tune

__all__ = ["tune"]
