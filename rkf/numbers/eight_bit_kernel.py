"""The kernel of products in eight bits. Its sums are whole numbers, so they are exact, and the same on every CPU.

With AVX-512 (VNNI) vpdpbusd multiplies bytes: 6 rows of x times 64 rows of weights take 24 registers of sums, 4 of
weights and one of x. On one thread of an Emerald Rapids Xeon it reaches 330 to 430 GOPS where numpy's f32 products
reach 70 to 120. With AVX2 vpmaddwd multiplies words, first of the even bytes, then of the odd ones: 6 rows of x times
16 of weights take 12 registers of sums.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.core.extending import intrinsic

BLOCK = 128  # numbers of a row that share a scale
TILE = 6  # rows of x
QUAD = 4  # numbers that a lane of the register multiplies
OFFSET = 128  # products are of signed and of unsigned bytes, so this is added to weights
PANEL = 64  # rows of weights
_QUADS = BLOCK // QUAD
_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


class ProductForm(NamedTuple):
    """How a CPU multiplies. lanes: of a register of sums; held: registers of weights at a time; words: numbers are
    multiplied as words, for lack of vpdpbusd.
    """

    lanes: int
    held: int
    words: bool


VNNI, AVX2 = ProductForm(16, 4, words=False), ProductForm(8, 2, words=True)


@cache
def form() -> ProductForm | None:
    """That of this CPU; None if the kernel cannot run here."""
    found = binding.get_host_cpu_features()
    if found.get("avx512f") and found.get("avx512vnni"):
        return VNNI
    return AVX2 if found.get("avx2") else None


@njit(cache=True, nogil=True)
def multiply(x, x_scales, x_sums, weights, scales, out):
    """out += x weights^T. x: those of `eight_bits.Rounded`; weights: of `Panels`; out: f32[tiled rows, panels * 64]."""
    for panel in range(weights.shape[0]):
        for block in range(weights.shape[1]):
            some, factors = weights[panel, block].ctypes.data, scales[panel, block].ctypes.data
            for row in range(0, out.shape[0], TILE):
                _add_tile(  # type: ignore[call-arg]  # the typing context is Numba's to pass
                    x[block, row:].ctypes.data,
                    x_scales[block, row:].ctypes.data,
                    x_sums[block, row:].ctypes.data,
                    some,
                    factors,
                    out[row:, panel * PANEL :].ctypes.data,
                    out.strides[0],
                )


@intrinsic
def _add_tile(typingctx, x, x_scales, x_sums, weights, scales, out, stride):
    """out[6, 64] += x weights^T over one block. All are addresses, i64, except stride: the bytes of a row of out."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x, x_scales, x_sums, weights, scales, out, stride = args
        tile = _Tile(builder, form() or AVX2)
        numbers = tile.numbers(x)
        together = tile.form.held * tile.form.lanes
        for first in range(0, PANEL, together):
            sums = tile.sums(numbers, _moved(builder, weights, first * QUAD))
            factors = [tile.load(scales, tile.f32s, 4 * first, n) for n in range(tile.form.held)]
            for row in range(TILE):
                added = tile.everywhere(builder.mul(_load(builder, x_sums, _I32, 4 * row), _I32(OFFSET)))
                scale = tile.everywhere(_load(builder, x_scales, _F32, 4 * row))
                line = _moved(builder, builder.add(out, builder.mul(stride, _I64(row))), 4 * first)
                for n in range(tile.form.held):
                    exact = builder.sitofp(builder.sub(sums[row][n], added), tile.f32s)  # below 2^24
                    scaled = builder.fmul(exact, builder.fmul(scale, factors[n]))
                    total = builder.fadd(tile.load(line, tile.f32s, 0, n), scaled)
                    builder.store(total, _pointer(builder, line, tile.f32s, 4 * tile.form.lanes * n), align=1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


class _Tile:
    """Code for a form."""

    def __init__(self, builder: Any, form: ProductForm) -> None:
        self.builder, self.form = builder, form
        self.f32s, self.i32s = ir.VectorType(_F32, form.lanes), ir.VectorType(_I32, form.lanes)
        self.i16s = ir.VectorType(_I16, 2 * form.lanes)

    def numbers(self, x: Any) -> list[Any]:
        """Where the numbers of x lie, as the products take them: i8[6, 128], or two i16[6, 64], of the even numbers and
        of the odd ones. Addresses.
        """
        if not self.form.words:
            return [x]
        size = TILE * BLOCK
        places = [
            self.builder.ptrtoint(cgutils.alloca_once(self.builder, ir.ArrayType(ir.IntType(8), size)), _I64)
            for _ in range(2)
        ]
        for at in range(0, size, 4 * self.form.lanes):
            pairs = _load(self.builder, x, self.i16s, at)
            for place, words in zip(places, self._words(pairs, self.builder.ashr), strict=True):
                self.builder.store(words, _pointer(self.builder, place, self.i16s, at), align=1)
        return places

    def sums(self, numbers: list[Any], weights: Any) -> list[list[Any]]:
        """The sums of products with the held registers of weights, by row of x and register."""
        totals = [ir.Constant(self.i32s, None)] * (TILE * self.form.held)
        for part, place in enumerate(numbers):  # a loop each: LLVM would keep more sums than there are registers
            totals = self._more(totals, place, weights, part)
        return [totals[at : at + self.form.held] for at in range(0, len(totals), self.form.held)]

    def _more(self, totals: list[Any], place: Any, weights: Any, part: int) -> list[Any]:
        """The totals plus the products of one of `numbers`."""
        builder = self.builder
        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        quad = builder.phi(_I64)
        phis = [builder.phi(self.i32s) for _ in totals]
        panel = builder.add(weights, builder.mul(quad, _I64(PANEL * QUAD)))
        held = [self._part(self.load(panel, self.i32s, 0, n), part) for n in range(self.form.held)]
        start = builder.add(place, builder.mul(quad, _I64(QUAD)))
        new = []
        for row in range(TILE):
            spread = self.everywhere(_load(builder, start, _I32, BLOCK * row))
            of_row = phis[row * self.form.held :]
            new += [self._added(total, each, spread) for total, each in zip(of_row, held, strict=False)]
        following = builder.add(quad, _I64(1))
        quad.add_incoming(_I64(0), before)
        quad.add_incoming(following, loop)
        for phi, total, value in zip(phis, totals, new, strict=True):
            phi.add_incoming(total, before)
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, _I64(_QUADS)), loop, after)
        builder.position_at_end(after)
        return new

    def _part(self, weights: Any, part: int) -> Any:
        """A register of weights as it meets that part of `numbers`."""
        if not self.form.words:
            return weights
        return self._words(self.builder.bitcast(weights, self.i16s), self.builder.lshr)[part]

    def _words(self, pairs: Any, shift: Any) -> tuple[Any, Any]:
        """The even and the odd bytes as words. shift: to the right, with or without the sign."""
        eight = ir.Constant(self.i16s, [_I16(8)] * self.i16s.count)
        return shift(self.builder.shl(pairs, eight), eight), shift(pairs, eight)

    def _added(self, total: Any, weights: Any, x: Any) -> Any:
        """The total plus, in each lane, products of the numbers of weights and of x."""
        if not self.form.words:
            return self._call("llvm.x86.avx512.vpdpbusd.512", self.i32s, total, weights, x)
        products = self._call("llvm.x86.avx2.pmadd.wd", self.i32s, weights, self.builder.bitcast(x, self.i16s))
        return self.builder.add(total, products)

    def _call(self, name: str, result: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [each.type for each in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    def load(self, address: Any, kind: Any, offset: int, register: int) -> Any:
        return _load(self.builder, address, kind, offset + 4 * self.form.lanes * register)

    def everywhere(self, scalar: Any) -> Any:
        """A register whose lanes are all this number."""
        empty = ir.Constant(ir.VectorType(scalar.type, self.form.lanes), ir.Undefined)
        first = self.builder.insert_element(empty, scalar, _I32(0))
        return self.builder.shuffle_vector(first, first, ir.Constant(self.i32s, None))


def _moved(builder: Any, address: Any, offset: int) -> Any:
    return builder.add(address, _I64(offset))


def _pointer(builder: Any, address: Any, kind: Any, offset: int) -> Any:
    return builder.inttoptr(_moved(builder, address, offset), kind.as_pointer())


def _load(builder: Any, address: Any, kind: Any, offset: int) -> Any:
    return builder.load(_pointer(builder, address, kind, offset), align=1)
