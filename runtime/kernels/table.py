"""Every kernel by name and level of CPU: the one place where specialisations are listed.

step:f32|f16|int8           a forward pass over a cache of that format
serve, publish              a worker thread's loop, and what starts a call (threads.py)
row:f32|bf16|f16|clustered  one row of a matrix as f32
f32                         product in f32, any number of tokens
one:W, many:W               fast products of one token and of many; W: index width, or 7i, 8i where ranks are the values
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from rkf.runtime.kernels import f32, half, int8_avx2, int8_avx512, int8_neon, int8_portable, products, serve
from rkf.runtime.kernels.cache_format import cache_format
from rkf.runtime.kernels.step import step
from rkf.runtime.kv_cache import FORMATS

_PRODUCT = (types.int64,) * 8  # matrix, activation, tokens, y, y_stride, low, high, scratch
_ROW = (types.int64,) * 3  # matrix, row, out
_STEP = (types.int64,) * 4  # plan, batch, thread, tag

_LEVELS: dict[str, Any] = {
    "avx512": int8_avx512,
    "avx2": int8_avx2,
    "neon": int8_neon,
    "portable": int8_portable,
}

Kernel = tuple[Callable[..., Any], tuple[Any, ...]]


def _row(name: str, level: str) -> Callable[..., Any]:
    if name == "clustered":
        return f32.clustered_row
    if name == "f32":
        return f32.dense_row(f32.f32_wide, f32.f32_single, 4)
    widen = half.bf16_widen if name == "bf16" else half.conversions(level)[0]
    return f32.dense_row(half.wide(widen), half.single(widen), 2)


def kernel(name: str, level: str) -> Kernel:
    """A kernel's function and its arguments' types."""
    family, _, variant = name.partition(":")
    if family == "step":
        return step(level, cache_format(variant, level)), _STEP
    if family in ("serve", "publish"):
        return getattr(serve, family), _STEP
    if family == "row":
        return _row(variant, level), _ROW
    if family == "f32":
        return f32.multiply, _PRODUCT
    level_kernels = _LEVELS[level]
    weights = level_kernels.WEIGHTS[variant]
    if family == "one":
        return products.multiply_one(weights, level_kernels.SUMS), _PRODUCT
    if level == "avx512":
        return int8_avx512.multiply_many(weights), _PRODUCT
    return products.multiply_many(weights, level_kernels.SUMS), _PRODUCT


def names(level: str) -> list[str]:
    """Every kernel of a level of CPU."""
    fixed = ["serve", "publish", "f32", *(f"step:{cache}" for cache in FORMATS)]
    rows = [f"row:{kind}" for kind in ("f32", "bf16", "f16", "clustered")]
    return fixed + rows + [f"{tokens}:{width}" for tokens in ("one", "many") for width in _LEVELS[level].WEIGHTS]
