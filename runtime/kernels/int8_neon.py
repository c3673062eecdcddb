"""Fast products on ARM (NEON with its dot product): tbl looks up 16 ranks at once, sdot multiplies signed bytes.

Tables hold the values themselves, not value + 128, because both operands of sdot are signed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.extending import intrinsic

from rkf.runtime.kernels import products, ranks
from rkf.runtime.kernels.inline import inline
from rkf.runtime.kernels.int8_portable import RANKS
from rkf.runtime.kernels.vectors import I8x64, I32x4, call_llvm, part_of, side_by_side

_BYTES = ir.VectorType(ir.IntType(8), 16)
_LARGEST_TABLE = 64  # bytes, the limit of one tbl


@intrinsic(prefer_literal=True)
def _look_up(typingctx, table, size, index):
    """llvm.aarch64.neon.tbl1, tbl2, tbl4: table[index] of `size` bytes (16 and up), 64 lanes, no undefined bits. A
    table over 64 bytes is looked up 64 bytes at a time; each part gives zero for the ranks of the others, and the
    results are or-ed.
    """
    bytes_ = size.literal_value

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], _BYTES.as_pointer())
        registers = [
            builder.load(builder.gep(pointer, [ir.Constant(ir.IntType(32), i)]), align=1) for i in range(bytes_ // 16)
        ]
        found = []
        for piece in range(4):
            lanes, total = part_of(builder, args[2], piece, 16), ir.Constant(_BYTES, None)
            for first in range(0, bytes_, _LARGEST_TABLE):
                some = registers[first // 16 :][:4]
                moved = builder.sub(lanes, ir.Constant(_BYTES, [first] * 16))
                name = f"llvm.aarch64.neon.tbl{len(some)}.v16i8"
                total = builder.or_(total, call_llvm(builder, name, _BYTES, [*some, moved]))
            found.append(total)
        return side_by_side(builder, found)

    return I8x64(types.int64, size, I8x64), codegen


@intrinsic
def _dot_signed(typingctx, total, a, b):
    """llvm.aarch64.neon.sdot: total[i] += sum of four i8 * i8 products, for all four quarters of a and b."""

    def codegen(context, builder, sig, args):
        sums = args[0]
        for piece in range(4):
            operands = [sums, part_of(builder, args[1], piece, 16), part_of(builder, args[2], piece, 16)]
            sums = call_llvm(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", I32x4.llvm, operands)
        return sums

    return I32x4(I32x4, I8x64, I8x64), codegen


def _looked_up(rank_registers: Callable[..., Any], size: int) -> Callable[..., Any]:
    @inline
    def weights(m, table, row, column):
        even, odd = rank_registers(m, row, column)
        return _look_up(table, size, even), _look_up(table, size, odd)

    return weights


@inline
def _identity8(m, table, row, column):
    """Ranks minus 128, as signed bytes."""
    even, odd = ranks.ranks8(m, row, column)
    return even ^ ranks.constant(-128), odd ^ ranks.constant(-128)


WEIGHTS = {
    **{width: _looked_up(registers, max(1 << int(width), 16)) for width, registers in RANKS.items()},
    **products.IDENTITIES,
    "8i": _identity8,
}


SUMS = products.two_digits(I8x64, I32x4, _dot_signed)
