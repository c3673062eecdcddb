"""Compiled arithmetic of conversions: products in eight bits, Hadamard transforms. Knows no model."""
