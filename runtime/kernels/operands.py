"""How kernels access the operands of a plan: a token's row of a value, words and numbers at an address."""

from __future__ import annotations

from numba import types

from rkf.runtime.kernels.inline import inline
from rkf.runtime.kernels.memory import load, store


@inline
def row_of(value, thread, token):
    """The address of a token's row of a VALUE."""
    return value.address + value.private * thread.memory + token * value.stride


@inline
def word(address, index):
    """Number `index` of i64[…]."""
    return load(types.int64, address + index * 8)


@inline
def number(address, index):
    """Number `index` of f32[…]."""
    return load(types.float32, address + index * 4)


@inline
def add_to(address, index, value):
    """f32[…][index] += value."""
    store(address + index * 4, number(address, index) + value)
