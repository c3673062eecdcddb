"""Tuning of values: centroids and affine factors learn to give the source's outputs; ranks stay. Needs torch."""

from rkf.tune.run import tune

__all__ = ["tune"]
