"""Indices to rank planes and back, in numpy. Knows only integers: no centroids, no files.

A plane is a plain bitstream: row-major, fields LSB-first, every row padded to a whole byte with zeros (spec/rkf-1.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkf.format.constants import plane_bits

U8 = NDArray[np.uint8]


def pack(indices: U8, bits: int) -> tuple[U8, ...]:
    """Split `indices: u8[rows, cols]` of `bits` bits into planes `u8[rows, row_bytes]`, most significant first."""
    planes, shift = [], bits
    for width in plane_bits(bits):
        shift -= width
        planes.append(_pack_fields((indices >> shift) & ((1 << width) - 1), width))
    return tuple(planes)


def unpack(planes: tuple[U8, ...], bits: int, columns: int) -> U8:
    """Join planes `u8[rows, row_bytes]` into `indices: u8[rows, columns]`; padding bits are ignored."""
    indices = np.zeros((planes[0].shape[0], columns), np.uint8)
    for plane, width in zip(planes, plane_bits(bits), strict=True):
        indices <<= width
        indices |= _unpack_fields(plane, width, columns)
    return indices


def unused_bits(plane: U8, width: int, columns: int) -> U8:
    """The padding bits at the end of each row, which must all be zero: `u8[rows]`."""
    used = columns * width - 8 * (plane.shape[1] - 1)
    return plane[:, -1] >> used if used < 8 else np.zeros(plane.shape[0], np.uint8)


def _pack_fields(fields: NDArray[Any], width: int) -> U8:
    if width == 1:
        return np.packbits(fields, axis=1, bitorder="little")
    per_byte = 8 // width
    short = -fields.shape[1] % per_byte
    if short:
        fields = np.pad(fields, ((0, 0), (0, short)))
    packed = fields[:, ::per_byte].copy()
    for i in range(1, per_byte):
        packed |= fields[:, i::per_byte] << (width * i)
    return packed


def _unpack_fields(plane: U8, width: int, columns: int) -> U8:
    if width == 1:
        return np.unpackbits(plane, axis=1, count=columns, bitorder="little")
    per_byte = 8 // width
    fields = np.empty((plane.shape[0], plane.shape[1] * per_byte), np.uint8)
    for i in range(per_byte):
        fields[:, i::per_byte] = (plane >> (width * i)) & ((1 << width) - 1)
    return fields[:, :columns]
