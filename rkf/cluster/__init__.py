"""Weights to ranks plus values: exact 1-D k-means, exceptions, affine factors, recipes. Knows no model file."""

from rkf.cluster.clustering import cluster
from rkf.cluster.recipe import Recipe, Rule

__all__ = ["Recipe", "Rule", "cluster"]
