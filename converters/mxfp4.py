"""Stacks of experts in MXFP4: 4-bit codes in blocks of 32 with one scale each. Knows no checkpoint.

Source: `convert_moe_packed_tensors` in transformers/integrations/mxfp4.py, and the OCP MX specification 1.0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rkf.converters.shards import StoredTensor
from rkf.converters.source import TensorSpec
from rkf.errors import SourceError
from rkf.format.matrix import F32, DenseTensor, from_f32

BLOCKS, SCALES = "_blocks", "_scales"  # endings of the two tensors' names
_BLOCK = 32
_HALF = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_VALUES = np.concatenate([_HALF, -_HALF])
_BIAS = 127


@dataclass(frozen=True, slots=True)
class Mxfp4Weight:
    """See rkf.converters.quantised.StoredWeight. blocks: u8[experts, rows, groups, 16]; scales without the last."""

    spec: TensorSpec
    blocks: StoredTensor
    scales: StoredTensor

    def read(self, start: int, stop: int) -> DenseTensor:
        """Every value is one of bf16."""
        values = decode(self.blocks.read(start, stop), self.scales.read(start, stop))
        return DenseTensor("bf16", from_f32(values, "bf16"))


def mxfp4_weight(name: str, blocks: StoredTensor, scales: StoredTensor | None) -> Mxfp4Weight:
    """The stack of values. name: that of the blocks. SourceError for shapes that do not belong together."""
    *outer, groups, half = blocks.shape or (0,)
    if len(outer) != 2 or half != _BLOCK // 2:
        shape = list(blocks.shape)
        raise SourceError(f"tensor {name}: expected [experts, rows, groups, {_BLOCK // 2}], got {shape}")
    wanted, got = (*outer, groups), scales.shape if scales else "none"
    if scales is None or scales.shape != wanted:
        raise SourceError(f"tensor {name.removesuffix(BLOCKS)}{SCALES}: expected shape {wanted}, got {got}")
    size = blocks.stored_bytes + scales.stored_bytes
    return Mxfp4Weight(TensorSpec((*outer, groups * _BLOCK), "bf16", "MXFP4", size), blocks, scales)


def decode(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> F32:
    """f32[..., 32 * groups], each a value of bf16. blocks: u8[..., groups, 16], the even number in the low bits.

    scales: u8[..., groups], the exponents of powers of two.
    """
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, _BLOCK)
    values = np.ldexp(_VALUES[codes], (scales.astype(np.int32) - _BIAS)[..., None])
    return values.reshape(*scales.shape[:-1], -1)
