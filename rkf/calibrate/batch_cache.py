"""The cache of a batch of sequences: keys and values in 16 bits, and the states of ops in f32."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from rkf.format.matrix import F32, from_f32, to_f32
from rkf.model.ops import Attention
from rkf.model.program import Program

KeyValues = tuple[F32, F32]
"""Keys f32[batch, kv_heads, positions, head_dim], values f32[batch, kv_heads, positions, value_dim]."""


class BatchCache:
    """length: tokens of each sequence so far, through all layers. states: by layer and name of the op."""

    def __init__(self, program: Program, batch: int, capacity: int) -> None:
        self.length = 0
        self.states: dict[tuple[int, str], F32] = {}
        owners = {layer: op for layer in range(program.layers) if (op := program.cache_of(layer)) is not None}
        shapes = {layer: _shapes(op, batch, capacity) for layer, op in owners.items()}
        # One allocation, which the system gets back as a whole.
        room = np.zeros(sum(prod(shape) for pair in shapes.values() for shape in pair), np.uint16)
        self._slots: dict[int, tuple[NDArray[np.uint16], NDArray[np.uint16]]] = {}
        start = 0
        for layer, (of_keys, of_values) in shapes.items():
            middle, end = start + prod(of_keys), start + prod(of_keys) + prod(of_values)
            self._slots[layer] = room[start:middle].reshape(of_keys), room[middle:end].reshape(of_values)
            start = end

    def extend(self, layer: int, keys: F32, values: F32) -> KeyValues:
        """All keys and values of a layer, including these of the next tokens, rounded to bf16."""
        end = self.length + keys.shape[2]
        for kept, new in zip(self._slots[layer], (keys, values), strict=True):
            kept[:, :, self.length : end] = from_f32(new, "bf16")
        return self.read(layer, keys.shape[2])

    def read(self, layer: int, tokens: int) -> KeyValues:
        """Keys and values of a layer that already holds those of the next `tokens` tokens."""
        keys, values = (to_f32(kept[:, :, : self.length + tokens], "bf16") for kept in self._slots[layer])
        return keys, values

    def advance(self, tokens: int) -> None:
        """Count tokens that have passed through all layers."""
        self.length += tokens


def _shapes(op: Attention, batch: int, capacity: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    before = (batch, op.kv_heads, capacity)
    return (*before, op.head_dim), (*before, op.value_dim)
