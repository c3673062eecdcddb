"""Matrices whose product is known. For inputs near it, only the difference is multiplied in eight bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rkf.calibrate.interpreter import F32, Stretch
from rkf.numbers.eight_bits import Near, Panels


class Known:
    """A matrix in f32 that keeps the input and the output of its only product, for those of inputs `near` it."""

    near: Near

    def __init__(self, weights: F32, packed: Panels) -> None:
        self._weights, self._packed = weights, packed

    def product(self, x: F32) -> F32:
        y: F32 = x @ self._weights.T
        self.near = Near(self._packed, x, y)
        return y


def known_matrices(stretch: Stretch, weights: Mapping[str, F32], packed: Mapping[str, Any]) -> dict[str, Known]:
    """The matrices of a stretch; not stacks, because tokens near a known one may go to other experts."""
    uses = Counter(stretch.prefix + name for op in stretch.ops for name in op.tensor_names())
    return {
        name: Known(weights[name], each)
        for name, each in packed.items()
        if isinstance(each, Panels) and uses[name] == 1
    }
