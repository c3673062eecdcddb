"""Tuning of values: centroids and affine factors learn to give the source's outputs; ranks stay. Needs torch."""

import rkf.torch  # noqa: F401 - says in one line that torch is missing
from rkf.tune.tuning import tune

__all__ = ["tune"]
