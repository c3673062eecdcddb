"""The product of one token with a 4-bit matrix, and the variants that lost to it: `python -m benchmarks.ladder`.

Each is first checked against the decoded weights, then timed in turn over one matrix that no cache near the core holds
(32 MB of ranks, one thread): least and median, beside a loop that only loads (ceiling.py). AVX-512 only.
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
from rkf.runtime import cpu_features
from rkf.runtime.kernels import int8_avx512, products
from rkf.runtime.kernels.build import emit, machine
from rkf.runtime.kernels.inline import inline, smaller
from rkf.runtime.kernels.memory import load, load_first, prefetch, store_first
from rkf.runtime.kernels.simd import bitcast, permute_bytes, splat, to_float
from rkf.runtime.kernels.vectors import F32x8, I8x64, I16x32, I32x8
from rkf.runtime.kernels.views import view
from rkf.runtime.layout import ACTIVATION, MATRIX
from tests.runtime.matrices import product, random_matrix, whole_activations

ARGUMENTS = 8
ROUNDS = 25


def weights(ahead: int, locality: int) -> Callable[..., Any]:
    """Ranks of 4 bits to bytes with a prefetch so many bytes ahead; 0: none."""

    @inline
    def read(m, table, row, block, columns):
        address = m.plane0 + row * m.stride0 + block * 64
        if ahead > 0:
            prefetch(address + ahead, locality)
        both = load_first(I8x64, address, (columns + 1) >> 1)
        values = load(I8x64, table)
        return permute_bytes(values, both), permute_bytes(values, bitcast(I8x64, bitcast(I16x32, both) >> 4))

    return read


def neighbours(read: Callable[..., Any]) -> Callable[..., Any]:
    """Eight rows one below the other at a time."""
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


VARIANTS = {
    "the product's own": streams(int8_avx512.WEIGHTS["4"]),
    "streams, no prefetch": streams(weights(0, 3)),
    "streams, prefetch to the second level": streams(weights(640, 2)),
    "streams, prefetch 4 kB ahead": streams(weights(4096, 3)),
    "neighbours, no prefetch": neighbours(weights(0, 3)),
    "neighbours, prefetch of the next eight rows": neighbours(weights(8 * 1024, 3)),
    "neighbours, prefetch 64 rows on to the second level": neighbours(weights(64 * 1024, 2)),
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
        """As `product` calls it."""
        began = perf_counter()
        self._call(*arguments)
        self.seconds.append(perf_counter() - began)


def check(variant: Variant) -> None:
    """Odd shapes, against the weights that the matrix decodes to."""
    for rows, columns in ((37, 129), (64, 576), (1, 7)):
        matrix = random_matrix(16, rows, columns, affine="tensor", seed=rows)
        whole, scale = whole_activations(1, columns)
        found = product(matrix, whole, scale, "avx512", run=variant.run)
        wanted = (whole * scale[:, None].astype(np.float64)) @ matrix.decode().astype(np.float64).T
        size = np.abs(whole * scale[:, None]) @ np.abs(matrix.decode()).T
        if not np.all(np.abs(found - wanted) <= 4e-6 * size):
            raise SystemExit("a variant does not compute the product")


def main() -> None:
    if cpu_features.level() != "avx512":
        raise SystemExit("the ladder is of AVX-512 kernels, which this CPU lacks")
    variants = {name: Variant(function) for name, function in VARIANTS.items()}
    for variant in variants.values():
        check(variant)
        variant.seconds.clear()
    matrix = random_matrix(16, 32768, 2048, affine="tensor")
    whole, scale = whole_activations(1, matrix.columns)
    for _ in range(ROUNDS):
        for variant in variants.values():
            product(matrix, whole, scale, "avx512", run=variant.run)
    loader, plane = Loader(), matrix.planes[0].reshape(-1)
    loads = [loader.seconds([plane], 1, passes=1) for _ in range(ROUNDS)]
    for name, seconds in [*((name, variant.seconds) for name, variant in variants.items()), ("loads alone", loads)]:
        rate = plane.size / median(seconds) / 1e9
        print(f"{name:52} {min(seconds) * 1e3:6.2f} ms, median {median(seconds) * 1e3:6.2f} ms, {rate:5.1f} GB/s")


if __name__ == "__main__":
    main()
