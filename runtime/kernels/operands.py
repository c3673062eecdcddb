"""How kernels access the operands of a plan: a token's row of a value, words and numbers at an address, and what
attention sees.
"""

from __future__ import annotations

from numba import types

from rkf.runtime.kernels.inline import inline, larger
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
def first_seen(position, seen):
    """The first position that attention from `position` sees; seen: as in ATTENTION."""
    if seen > 0:
        return larger(position - seen + 1, types.int64(0))
    if seen < 0:
        return position - position % -seen
    return types.int64(0)


@inline
def add_to(address, index, value):
    """f32[…][index] += value."""
    store(address + index * 4, number(address, index) + value)
