"""The products of one token and of eight with a 4-bit matrix, and slower variants of them:
`python -m benchmarks.ladder`.

Each is first checked against the decoded weights. Then all are timed in turn over one matrix that does not fit the
caches near the core (32 MB of ranks, one thread): minimum and median, beside a loop that only loads (ceiling.py).
AVX-512 only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from numba import types

from benchmarks.ceiling import Loader
from rkf.format.matrix import ClusteredMatrix
from rkf.runtime import cpu_features
from rkf.runtime.kernels import int8_avx512, many_avx512, products
from rkf.runtime.kernels.build import emit, machine
from rkf.runtime.kernels.inline import inline, smaller
from rkf.runtime.kernels.instructions import permute_bytes
from rkf.runtime.kernels.memory import load, load_first, prefetch, store_first, store_lanes
from rkf.runtime.kernels.simd import bitcast, splat, to_float
from rkf.runtime.kernels.vectors import F32x8, I8x64, I16x32, I32x8
from rkf.runtime.kernels.views import view
from rkf.runtime.structs import ACTIVATION, BLOCK, MATRIX
from tests.runtime.matrices import product, random_matrix, whole_activations

ARGUMENTS = 8
ROUNDS = 25


def weights(ahead: int, locality: int) -> Callable[..., Any]:
    """4-bit ranks to bytes, with a prefetch this many bytes ahead; 0 for none."""

    @inline
    def read(m, table, row, column):
        address = m.plane0 + row * m.stride0 + (column >> 1)
        if ahead > 0:
            prefetch(address + ahead, locality)
        both = load(I8x64, address)
        values = load(I8x64, table)
        return permute_bytes(values, both), permute_bytes(values, bitcast(I8x64, bitcast(I16x32, both) >> 4))

    return read


def neighbours(read: Callable[..., Any]) -> Callable[..., Any]:
    """Eight neighbouring rows at a time."""
    eight = products.eight_rows(read, int8_avx512.SUMS)

    def kernel(matrix, activation, tokens, y, y_stride, low, high, scratch):
        m, x = view(MATRIX, matrix), view(ACTIVATION, activation)
        correction = splat(I32x8, types.int32(m.offset * load(types.int32, x.total)))
        for row in range(low, high, 8):
            values = to_float(F32x8, eight(m, m.table, x.packed, row, types.int64(1), high - 1) + correction)
            store_first(y + row * 4, values, smaller(high - row, types.int64(8)))
        products.scale_rows(m, x, types.int64(0), y, low, high)

    return kernel


def streams(read: Callable[..., Any]) -> Callable[..., Any]:
    """Eight streams of consecutive rows, far apart."""
    return products.multiply_one(read, int8_avx512.SUMS)


def row_by_row(read: Callable[..., Any]) -> Callable[..., Any]:
    """Eight tokens: each block of a row is decoded once, in registers, and multiplied with all of them."""
    _, zero, activations, add, join, *_ = int8_avx512.SUMS

    @inline
    def step(total, even, odd, packed):
        return add(total, even, odd, activations(packed))

    @inline
    def block_of(totals, m, row, first, packed, stride):
        even, odd = read(m, m.table, row, smaller(first, m.end - BLOCK))
        x = packed + 2 * first
        t0, t1, t2, t3, t4, t5, t6, t7 = totals
        return (
            step(t0, even, odd, x),
            step(t1, even, odd, x + stride),
            step(t2, even, odd, x + 2 * stride),
            step(t3, even, odd, x + 3 * stride),
            step(t4, even, odd, x + 4 * stride),
            step(t5, even, odd, x + 5 * stride),
            step(t6, even, odd, x + 6 * stride),
            step(t7, even, odd, x + 7 * stride),
        )

    def kernel(matrix, activation, tokens, y, y_stride, low, high, scratch):
        m, x = view(MATRIX, matrix), view(ACTIVATION, activation)
        correction = load_first(I32x8, x.total, tokens) * splat(I32x8, types.int32(m.offset))
        for row in range(low, high):
            z = zero()
            totals = (z, z, z, z, z, z, z, z)
            for first in range(0, m.end, BLOCK):
                totals = block_of(totals, m, row, first, x.packed, x.packed_stride)
            store_lanes(y + row * 4, y_stride, to_float(F32x8, join(*totals) + correction), tokens)
        for token in range(tokens):
            products.scale_rows(m, x, token, y + token * y_stride, low, high)

    return kernel


ONE_TOKEN = {
    "the product in use": streams(int8_avx512.WEIGHTS["4"]),
    "streams, no prefetch": streams(weights(0, 3)),
    "streams, prefetch to the second-level cache": streams(weights(640, 2)),
    "streams, prefetch 4 kB ahead": streams(weights(4096, 3)),
    "neighbours, no prefetch": neighbours(weights(0, 3)),
    "neighbours, prefetch of the next eight rows": neighbours(weights(8 * 1024, 3)),
    "neighbours, prefetch 64 rows ahead to the second-level cache": neighbours(weights(64 * 1024, 2)),
}


EIGHT_TOKENS = {
    "the product in use": many_avx512.multiply_many("4"),
    "one row at a time": row_by_row(int8_avx512.WEIGHTS["4"]),
}


class Variant:
    """A kernel, compiled and linked."""

    def __init__(self, function: Callable[..., Any]) -> None:
        code = emit(function, (types.int64,) * ARGUMENTS, "variant", machine("avx512"))
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self._compiler = llvm.create_lljit_compiler()
        builder = llvm.JITLibraryBuilder().add_object_img(code).export_symbol("variant")
        self._library = builder.link(self._compiler, "variant")
        self._call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * ARGUMENTS)(self._library["variant"])
        self.seconds: list[float] = []

    def run(self, name: str, *arguments: int) -> None:
        """Call it as `product` does."""
        began = perf_counter()
        self._call(*arguments)
        self.seconds.append(perf_counter() - began)


def check(variant: Variant, tokens: int) -> None:
    """Compare with the decoded weights on odd shapes."""
    for rows, columns in ((37, 129), (64, 576), (1, 7)):
        matrix = random_matrix(16, rows, columns, affine="tensor", seed=rows)
        whole, scale = whole_activations(tokens, columns)
        found = product(matrix, whole, scale, "avx512", run=variant.run)
        wanted = (whole * scale[:, None].astype(np.float64)) @ matrix.decode().astype(np.float64).T
        size = np.abs(whole * scale[:, None]) @ np.abs(matrix.decode()).T
        if not np.all(np.abs(found - wanted) <= 4e-6 * size):
            raise SystemExit("a variant gives a wrong product")


def climb(functions: dict[str, Callable[..., Any]], tokens: int, matrix: ClusteredMatrix) -> None:
    """Check the variants, time them in turn, and print them."""
    variants = {name: Variant(function) for name, function in functions.items()}
    for variant in variants.values():
        check(variant, tokens)
        variant.seconds.clear()
    whole, scale = whole_activations(tokens, matrix.columns)
    for _ in range(ROUNDS):
        for variant in variants.values():
            product(matrix, whole, scale, "avx512", run=variant.run)
    for name, variant in variants.items():
        show(f"{name}, {tokens} tokens", variant.seconds, matrix)


def show(name: str, seconds: list[float], matrix: ClusteredMatrix) -> None:
    rate = matrix.planes[0].size / median(seconds) / 1e9
    print(f"{name:62} {min(seconds) * 1e3:6.2f} ms, median {median(seconds) * 1e3:6.2f} ms, {rate:5.1f} GB/s")


def main() -> None:
    if cpu_features.level() != "avx512":
        raise SystemExit("the ladder has AVX-512 kernels, which this CPU lacks")
    matrix = random_matrix(16, 32768, 2048, affine="tensor")
    climb(ONE_TOKEN, 1, matrix)
    climb(EIGHT_TOKENS, 8, matrix)
    loader, plane = Loader(), matrix.planes[0].reshape(-1)
    show("loads alone", [loader.seconds([plane], 1, passes=1) for _ in range(ROUNDS)], matrix)


if __name__ == "__main__":
    main()
