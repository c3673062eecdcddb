"""Every kernel by name and level of CPU: the one place where specialisations are listed.

step:f16, step:f32          a forward pass over a cache of that format
serve:f16, serve:f32        a worker thread's loop around it
publish                     starts a call and says whom to wake
row:f32|bf16|f16|clustered  one row of a matrix as f32
f32                         product in f32, any number of tokens
one:W, many:W               fast products of one token and of many; W: index width, or 7i, 8i where ranks are the values
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from rkf.runtime.kernels import f32, half, int8_avx2, int8_avx512, int8_portable, products, serve
from rkf.runtime.kernels.step import step

_PRODUCT = (types.int64,) * 8  # matrix, activation, tokens, y, y_stride, low, high, scratch
_ROW = (types.int64,) * 3  # matrix, row, out
_STEP = (types.int64,) * 4  # plan, batch, thread, tag

_LEVELS: dict[str, Any] = {"avx512": int8_avx512, "avx2": int8_avx2, "portable": int8_portable}

Kernel = tuple[Callable[..., Any], tuple[Any, ...]]


def _cache_format(name: str, level: str) -> tuple[Callable[..., Any], Callable[..., Any], int]:
    if name == "f32":
        return f32.f32_wide, f32.f32_write, 4
    if level == "portable":
        return half.wide(half.portable_widen), half.writer(half.portable_narrow), 2
    return half.wide(half.hardware_widen), half.writer(half.hardware_narrow), 2


def _row(name: str, level: str) -> Callable[..., Any]:
    if name == "clustered":
        return f32.clustered_row
    if name == "f32":
        return f32.dense_row(f32.f32_wide, f32.f32_single, 4)
    widen = half.portable_widen if level == "portable" else half.hardware_widen
    if name == "bf16":
        widen = half.bf16_widen
    return f32.dense_row(half.wide(widen), half.single(widen), 2)


def kernel(name: str, level: str) -> Kernel:
    """A kernel's function and its arguments' types."""
    family, _, variant = name.partition(":")
    if family == "step":
        return step(level, _cache_format(variant, level)), _STEP
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
