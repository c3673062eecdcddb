"""Fast products on AVX-512 (VBMI, VNNI): vpermb looks up 64 ranks at once, vpdpbusd multiplies the bytes.

Products of several tokens are in many_avx512.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rkf.format.constants import plane_bits
from rkf.runtime.kernels import products
from rkf.runtime.kernels.instructions import dot_bytes
from rkf.runtime.kernels.vectors import I8x64, I32x16
from rkf.runtime.kernels.weights_avx512 import FAR_WEIGHTS, WEIGHTS

SUMS = products.two_digits(I8x64, I32x16, dot_bytes)


def multiply_one(width: str, far: bool = False) -> Callable[..., Any]:
    """products.multiply_one for a width of WEIGHTS. Eight rows at a time of several planes do not fit the registers.
    far: prefetch into the second-level cache.
    """
    planes = len(plane_bits(int(width[0])))
    return products.multiply_one((FAR_WEIGHTS if far else WEIGHTS)[width], SUMS._replace(rows=8 if planes == 1 else 4))
