"""Weights in FP8 (E4M3, no infinities): 8-bit codes times a scale for the tensor, each row or each block.

Source: `Fp8Dequantize` in transformers/integrations/finegrained_fp8.py, compressed-tensors' `dequantize`, and
arXiv 2209.05433. Values are f32: a scale has up to 24 bits, so a product has more than the 8 of bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rkf.converters.shards import StoredTensor
from rkf.converters.source import TensorSpec
from rkf.errors import SourceError
from rkf.format.matrix import F32, DenseTensor, to_f32

CODES = "F8_E4M3"
_POWERS = ("U8", "F8_E8M0")  # scales that are exponents of two
_BIAS = 127


def _values() -> F32:
    """The number of each code: a sign, 4 bits of exponent (bias 7), 3 of mantissa; the last of each sign is NaN."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    found = np.where(exponent > 0, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(1.0 * mantissa, -9))
    found[127] = np.nan
    return np.concatenate([found, -found]).astype(np.float32)


_VALUES = _values()


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """See rkf.converters.quantised.StoredWeight. block: the rows and columns that share a scale."""

    spec: TensorSpec
    codes: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]

    def read(self, start: int, stop: int) -> DenseTensor:
        codes, scales = self.codes.read(start, stop), _numbers(self.scales)
        if codes.ndim == 2:
            return DenseTensor("f32", decode(codes, scales, self.block, start))
        parts = [decode(each, scales[start + at], self.block) for at, each in enumerate(codes)]
        return DenseTensor("f32", np.stack(parts))


def fp8_weight(
    name: str, codes: StoredTensor, scales: tuple[str, StoredTensor | None], block: tuple[int, int] | None
) -> Fp8Weight:
    """The weight. scales: their name, and the tensor. block: of a scale, where there is not one for each row or tensor.

    Raises SourceError for shapes that do not belong together.
    """
    if len(codes.shape) not in (2, 3):
        raise SourceError(f"tensor {name}: expected 2 or 3 dimensions in FP8, got shape {list(codes.shape)}")
    *outer, rows, cols = codes.shape
    grids = {(): (rows, cols), (1,): (rows, cols), (1, 1): (rows, cols), (rows,): (1, cols), (rows, 1): (1, cols)}
    if block:
        grids[-(-rows // block[0]), -(-cols // block[1])] = block
    label, found = scales
    got = found.shape if found else None
    inner = got[len(outer) :] if got is not None and list(got[: len(outer)]) == outer else None
    if found is None or inner not in grids:
        usual = [grid for grid, size in grids.items() if size == block] or [(1,), (rows, 1)]
        wanted = " or ".join(str([*outer, *grid]) for grid in usual)
        raise SourceError(f"tensor {label}: expected shape {wanted}, got {'none' if got is None else list(got)}")
    size = codes.stored_bytes + found.stored_bytes
    return Fp8Weight(TensorSpec(codes.shape, "f32", CODES, size), codes, found, grids[inner])


def decode(codes: NDArray[np.uint8], scales: F32, block: tuple[int, int], start: int = 0) -> F32:
    """f32[rows, cols]. codes: of the rows from `start` on. scales: f32, of the whole matrix, one for each block."""
    rows, cols = codes.shape
    grid = scales.reshape(-1, -(-cols // block[1]))
    values = _VALUES[codes]
    for number in range(start // block[0], -(-(start + rows) // block[0])):
        first, last = number * block[0] - start, (number + 1) * block[0] - start
        values[max(first, 0) : last] *= np.repeat(grid[number], block[1])[:cols]
    return values


def _numbers(scales: StoredTensor) -> F32:
    held = scales.read()
    if scales.dtype in _POWERS:
        return np.ldexp(np.float32(1), held.astype(np.int32) - _BIAS)
    return to_f32(held, {"BF16": "bf16", "F16": "f16"}.get(scales.dtype, "f32"))
