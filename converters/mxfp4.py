"""Stacks of experts in MXFP4: 4-bit codes in blocks of 32 with one scale each. Knows no checkpoint.

Source: `convert_moe_packed_tensors` in transformers/integrations/mxfp4.py, and the OCP MX specification 1.0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rkf.format.matrix import F32

BLOCKS, SCALES = "_blocks", "_scales"  # endings of the two tensors' names
BLOCK = 32
_HALF = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_VALUES = np.concatenate([_HALF, -_HALF])
_BIAS = 127


def decode(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> F32:
    """f32[..., 32 * groups], each a value of bf16. blocks: u8[..., groups, 16], the even number in the low bits.

    scales: u8[..., groups], the exponents of powers of two.
    """
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    values = np.ldexp(_VALUES[codes], (scales.astype(np.int32) - _BIAS)[..., None])
    return values.reshape(*scales.shape[:-1], -1)
