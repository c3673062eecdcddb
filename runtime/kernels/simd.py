"""Operations on registers inside Numba functions: intrinsics of one LLVM operation each, which mean the same on every
CPU. Those of one instruction set: instructions.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.core.extending import intrinsic

from rkf.runtime.kernels.vectors import (
    I32,
    I64,
    I32x4,
    I32x8,
    I32x16,
    Vector,
    broadcast,
    call_llvm,
    constants,
    instance,
    pointer_to,
    shuffle,
    side_by_side,
)


@intrinsic
def splat(typingctx, kind, scalar):
    """One scalar in all lanes."""
    result = instance(kind)
    element = {"f32": types.float32, "i8": types.int8, "i16": types.int16, "i32": types.int32, "i64": types.int64}[
        result.element
    ]

    def codegen(context, builder, sig, args):
        return broadcast(builder, result, args[1])

    return result(kind, element), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """llvm.fma: a * b + c rounded once."""

    def codegen(context, builder, sig, args):
        return call_llvm(builder, f"llvm.fma.v{a.lanes}f32", args[0].type, list(args))

    return a(a, a, a), codegen


@intrinsic
def maximum(typingctx, a, b):
    """fcmp olt + select: the larger, lane by lane (or of two scalars)."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[1], args[0])

    return a(a, a), codegen


@intrinsic
def minimum(typingctx, a, b):
    """fcmp olt + select: the smaller, lane by lane."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[0], args[1])

    return a(a, a), codegen


@intrinsic
def absolute(typingctx, a):
    """llvm.fabs."""

    def codegen(context, builder, sig, args):
        return call_llvm(builder, f"llvm.fabs.v{a.lanes}f32", args[0].type, list(args))

    return a(a), codegen


@intrinsic
def select(typingctx, mask, a, b):
    """select: lanes of a where the mask is set, of b elsewhere."""

    def codegen(context, builder, sig, args):
        return builder.select(*args)

    return a(mask, a, a), codegen


@intrinsic
def lanes_below(typingctx, kind, count):
    """A mask of the first `count` lanes (count is clamped to 0..lanes)."""
    result = instance(kind)

    def codegen(context, builder, sig, args):
        lanes = constants(Vector("i64", result.lanes), list(range(result.lanes)))
        return builder.icmp_signed("<", lanes, broadcast(builder, Vector("i64", result.lanes), args[1]))

    return result(kind, types.int64), codegen


@intrinsic
def any_bit(typingctx, a, b):
    """icmp ne (a & b), 0: a mask of the lanes where a and b have a common bit."""

    def codegen(context, builder, sig, args):
        return builder.icmp_signed("!=", builder.and_(*args), constants(a, 0))

    return Vector("i1", a.lanes)(a, a), codegen


@intrinsic
def repeat_lanes(typingctx, kind, value):
    """shufflevector: every lane repeated to fill the wider register."""
    result = instance(kind)

    def codegen(context, builder, sig, args):
        times = result.lanes // value.lanes
        return shuffle(builder, args[1], args[1], [i // times for i in range(result.lanes)])

    return result(kind, value), codegen


@intrinsic(prefer_literal=True)
def part(typingctx, kind, value, index):
    """shufflevector: the index-th piece of a wider register."""
    result, first = instance(kind), index.literal_value * instance(kind).lanes

    def codegen(context, builder, sig, args):
        return shuffle(builder, args[1], args[1], list(range(first, first + result.lanes)))

    return result(kind, value, index), codegen


@intrinsic
def join(typingctx, kind, a, b):
    """shufflevector: two registers side by side in one of twice the width."""
    result = instance(kind)

    def codegen(context, builder, sig, args):
        return shuffle(builder, args[1], args[2], list(range(result.lanes)))

    return result(kind, a, b), codegen


@intrinsic
def bitcast(typingctx, kind, value):
    """The same bits as another type of the same size."""
    result = instance(kind)

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[1], context.get_data_type(result))

    return result(kind, value), codegen


@intrinsic
def zero_extend(typingctx, kind, value):
    """zext, lane by lane."""
    result = instance(kind)

    def codegen(context, builder, sig, args):
        return builder.zext(args[1], result.llvm)

    return result(kind, value), codegen


@intrinsic
def sign_extend(typingctx, kind, value):
    """sext, lane by lane."""
    result = instance(kind)

    def codegen(context, builder, sig, args):
        return builder.sext(args[1], result.llvm)

    return result(kind, value), codegen


@intrinsic
def truncate(typingctx, kind, value):
    """trunc, lane by lane."""
    result = instance(kind)

    def codegen(context, builder, sig, args):
        return builder.trunc(args[1], result.llvm)

    return result(kind, value), codegen


@intrinsic
def to_float(typingctx, kind, value):
    """sitofp, lane by lane, nearest even."""
    result = instance(kind)

    def codegen(context, builder, sig, args):
        return builder.sitofp(args[1], result.llvm)

    return result(kind, value), codegen


@intrinsic
def widen(typingctx, kind, value):
    """fpext, lane by lane (f16 to f32 needs F16C on x86)."""
    result = instance(kind)

    def codegen(context, builder, sig, args):
        return builder.fpext(args[1], result.llvm)

    return result(kind, value), codegen


@intrinsic
def insert_lane(typingctx, value, index, scalar):
    """insertelement."""

    def codegen(context, builder, sig, args):
        return builder.insert_element(args[0], args[2], builder.trunc(args[1], I32))

    return value(value, types.int64, types.int32), codegen


@intrinsic
def first_lane(typingctx, value):
    """extractelement 0."""
    result = {"f32": types.float32, "f16": types.float16, "i16": types.int16, "i32": types.int32}[value.element]

    def codegen(context, builder, sig, args):
        return builder.extract_element(args[0], I32(0))

    return result(value), codegen


@intrinsic
def arithmetic_shift_right(typingctx, value, count):
    """ashr by a constant, lane by lane."""

    def codegen(context, builder, sig, args):
        return builder.ashr(args[0], broadcast(builder, value, builder.trunc(args[1], value.llvm.element)))

    return value(value, types.int64), codegen


@intrinsic
def even_lanes(typingctx, a, b):
    """shufflevector: lanes 0, 2, 4, … of a ++ b."""

    def codegen(context, builder, sig, args):
        return shuffle(builder, *args, [2 * i for i in range(a.lanes)])

    return a(a, a), codegen


@intrinsic
def odd_lanes(typingctx, a, b):
    """shufflevector: lanes 1, 3, 5, … of a ++ b."""

    def codegen(context, builder, sig, args):
        return shuffle(builder, *args, [2 * i + 1 for i in range(a.lanes)])

    return a(a, a), codegen


def _halve(builder: Any, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Fold a register to a scalar: lane i with lane i + half, until one is left."""
    lanes = vector.type.count
    while lanes > 1:
        lanes //= 2
        upper = shuffle(builder, vector, vector, list(range(lanes, 2 * lanes)))
        vector = combine(shuffle(builder, vector, vector, list(range(lanes))), upper)
    return builder.extract_element(vector, I32(0))


@intrinsic
def lane_sum(typingctx, a):
    """The sum of all lanes, adding halves pairwise: the same order on every CPU."""

    def codegen(context, builder, sig, args):
        return _halve(builder, args[0], builder.fadd if a.floating else builder.add)

    return (types.float32 if a.floating else types.int32)(a), codegen


@intrinsic
def lane_maximum(typingctx, a):
    """The largest lane of an f32 register."""

    def codegen(context, builder, sig, args):
        return _halve(builder, args[0], lambda x, y: builder.select(builder.fcmp_ordered("<", x, y), y, x))

    return types.float32(a), codegen


@intrinsic
def lane_sums(typingctx, a, b, c, d, e, f, g, h):
    """Eight i32 registers to the eight sums of their lanes: a shuffle tree that adds even and odd lanes, no scalars."""

    def codegen(context, builder, sig, args):
        rows = list(args)
        lanes = a.lanes
        while len(rows) > 1 and len(rows) * lanes > 8:
            # Add the even and odd lanes of two registers: each half of the result belongs to one of them.
            evens, odds = [2 * i for i in range(lanes)], [2 * i + 1 for i in range(lanes)]
            rows = [
                builder.add(shuffle(builder, x, y, evens), shuffle(builder, x, y, odds))
                for x, y in zip(rows[::2], rows[1::2], strict=True)
            ]
        left = side_by_side(builder, rows)  # the lanes of each row are neighbours
        while left.type.count > 8:
            half = left.type.count // 2
            left = builder.add(
                shuffle(builder, left, left, [2 * i for i in range(half)]),
                shuffle(builder, left, left, [2 * i + 1 for i in range(half)]),
            )
        return left

    return I32x8(*[a] * 8), codegen


@intrinsic
def transpose_words(typingctx, source, stride, target):
    """Sixteen rows of sixteen i32, `stride` bytes apart, stored as sixteen contiguous columns: four rounds of
    shuffles.
    """

    def codegen(context, builder, sig, args):
        vector = I32x16.llvm
        rows = []
        for i in range(16):
            address = builder.add(args[0], builder.mul(args[1], I64(i)))
            rows.append(builder.load(pointer_to(builder, address, vector), align=1))
        for distance in (8, 4, 2, 1):
            # Swap the off-diagonal halves of every 2 x 2 arrangement of blocks `distance` wide.
            low = [(i // distance % 2) * 16 + i - i // distance % 2 * distance for i in range(16)]
            high = [i + distance if i // distance % 2 == 0 else i + 16 for i in range(16)]
            for i in range(16):
                if i // distance % 2 == 0:
                    a, b = rows[i], rows[i + distance]
                    rows[i], rows[i + distance] = shuffle(builder, a, b, low), shuffle(builder, a, b, high)
        for i, row in enumerate(rows):
            builder.store(row, pointer_to(builder, builder.add(args[2], I64(64 * i)), vector), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def transpose_quads(typingctx, source, stride, target):
    """Sixteen rows of four i32, `stride` bytes apart, stored as four contiguous columns: two rounds of shuffles within
    quarters of a register, which holds every fourth row.
    """

    def codegen(context, builder, sig, args):
        quad = I32x4.llvm
        rows = []
        for i in range(16):
            address = builder.add(args[0], builder.mul(args[1], I64(i)))
            rows.append(builder.load(pointer_to(builder, address, quad), align=1))
        a, b, c, d = (side_by_side(builder, rows[i::4]) for i in range(4))
        quarters = range(0, 16, 4)
        low = [lane for q in quarters for lane in (q, q + 16, q + 1, q + 17)]
        high = [lane for q in quarters for lane in (q + 2, q + 18, q + 3, q + 19)]
        left = [lane for q in quarters for lane in (q, q + 1, q + 16, q + 17)]
        right = [lane for q in quarters for lane in (q + 2, q + 3, q + 18, q + 19)]
        at = args[2]
        for lanes in (low, high):
            first, second = shuffle(builder, a, b, lanes), shuffle(builder, c, d, lanes)
            for half in (left, right):
                builder.store(shuffle(builder, first, second, half), pointer_to(builder, at, I32x16.llvm), align=1)
                at = builder.add(at, I64(64))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen
