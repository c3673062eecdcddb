"""Fast products on AVX2 with AVX-VNNI: the lookups of int8_avx2.py, and vpdpbusd on registers of 32 bytes.

Four rows at a time: their eight totals and a step's activations fit sixteen registers, those of eight rows do not.
"""

from __future__ import annotations

from rkf.runtime.kernels import int8_avx2, products
from rkf.runtime.kernels.instructions import dot_bytes_32
from rkf.runtime.kernels.vectors import I8x32, I32x8

WEIGHTS = int8_avx2.WEIGHTS
SUMS = products.two_digits(I8x32, I32x8, dot_bytes_32, rows=4)
