"""The common structure of a fast product on every CPU: eight rows at a time, integer sums, factors at the end.

Each level of CPU supplies `weights` (a step of a row as two registers of bytes, value + 128 or the rank itself) and
`Sums` (how such registers are multiplied with packed activations and added up). Sums are exact in int32 (structs.py),
so all levels give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import types

from rkf.runtime.kernels import ranks
from rkf.runtime.kernels.inline import inline, smaller
from rkf.runtime.kernels.memory import load, load_first, store, store_first, store_lanes
from rkf.runtime.kernels.simd import lane_sums, splat, to_float
from rkf.runtime.kernels.vectors import F32x8, F32x16, I32x8, I32x16, Vector
from rkf.runtime.kernels.views import view
from rkf.runtime.structs import ACTIVATION, LANES, MATRIX


class Sums(NamedTuple):
    """register: the type of a register of weights; a step has twice as many columns as that has lanes. rows: how many
    are summed at a time, 8, 4 or 2, so that their totals fit the CPU's registers. step_bytes: of a packed step; 0: two
    a column.

    zero() -> total; activations(address of a packed step) -> x; add(total, even, odd, x) -> total; join(eight totals)
    -> I32x8.
    """

    register: Vector
    zero: Callable[..., Any]
    activations: Callable[..., Any]
    add: Callable[..., Any]
    join: Callable[..., Any]
    rows: int = 8
    step_bytes: int = 0


def two_digits(register: Vector, totals: Vector, dot: Callable[..., Any], rows: int = 8) -> Sums:
    """The sums of a level that multiplies bytes: dot(total, weights, activations) adds to a `totals` of i32. There is
    one register for the high digits of activations (7 bits) and one for the low digits.
    """
    lanes = register.lanes

    @inline
    def zero():
        nothing = splat(totals, types.int32(0))
        return nothing, nothing

    @inline
    def activations(block):
        # Even high, odd high, even low, odd low.
        low = block + 2 * lanes
        return load(register, block), load(register, block + lanes), load(register, low), load(register, low + lanes)

    @inline
    def add(total, even, odd, x):
        high = dot(dot(total[0], even, x[0]), odd, x[1])
        low = dot(dot(total[1], even, x[2]), odd, x[3])
        return high, low

    @inline
    def whole(total):
        return (total[0] << 7) + total[1]

    @inline
    def join(a, b, c, d, e, f, g, h):
        return lane_sums(whole(a), whole(b), whole(c), whole(d), whole(e), whole(f), whole(g), whole(h))

    return Sums(register, zero, activations, add, join, rows)


def eight_rows(weights: Callable[..., Any], sums: Sums) -> Callable[..., Any]:
    """eight(m, table, packed, row, apart, last): the sums of rows row, row + apart, row + 2 apart, … up to `last`,
    I32x8.
    """
    zero, activations, add, join = sums.zero, sums.activations, sums.add, sums.join
    columns, rows_at_a_time = 2 * sums.register.lanes, sums.rows
    step_bytes = sums.step_bytes or 2 * columns

    @inline
    def step(total, m, table, row, column, x):
        even, odd = weights(m, table, row, column)
        return add(total, even, odd, x)

    @inline
    def two(m, table, packed, r0, r1):
        t0 = t1 = zero()
        for first in range(0, m.end, columns):
            x, column = activations(packed + first // columns * step_bytes), smaller(first, m.end - columns)
            t0 = step(t0, m, table, r0, column, x)
            t1 = step(t1, m, table, r1, column, x)
        return t0, t1

    @inline
    def four(m, table, packed, r0, r1, r2, r3):
        t0 = t1 = t2 = t3 = zero()
        for first in range(0, m.end, columns):
            x, column = activations(packed + first // columns * step_bytes), smaller(first, m.end - columns)
            t0 = step(t0, m, table, r0, column, x)
            t1 = step(t1, m, table, r1, column, x)
            t2 = step(t2, m, table, r2, column, x)
            t3 = step(t3, m, table, r3, column, x)
        return t0, t1, t2, t3

    @inline
    def eight(m, table, packed, row, apart, last):
        r1, r2, r3 = smaller(row + apart, last), smaller(row + 2 * apart, last), smaller(row + 3 * apart, last)
        r4, r5, r6 = smaller(row + 4 * apart, last), smaller(row + 5 * apart, last), smaller(row + 6 * apart, last)
        r7 = smaller(row + 7 * apart, last)
        if rows_at_a_time == 2:
            first_four = (*two(m, table, packed, row, r1), *two(m, table, packed, r2, r3))
            return join(*first_four, *two(m, table, packed, r4, r5), *two(m, table, packed, r6, r7))
        if rows_at_a_time == 4:
            return join(*four(m, table, packed, row, r1, r2, r3), *four(m, table, packed, r4, r5, r6, r7))
        t0 = t1 = t2 = t3 = t4 = t5 = t6 = t7 = zero()
        for first in range(0, m.end, columns):
            x, column = activations(packed + first // columns * step_bytes), smaller(first, m.end - columns)
            t0 = step(t0, m, table, row, column, x)
            t1 = step(t1, m, table, r1, column, x)
            t2 = step(t2, m, table, r2, column, x)
            t3 = step(t3, m, table, r3, column, x)
            t4 = step(t4, m, table, r4, column, x)
            t5 = step(t5, m, table, r5, column, x)
            t6 = step(t6, m, table, r6, column, x)
            t7 = step(t7, m, table, r7, column, x)
        return join(t0, t1, t2, t3, t4, t5, t6, t7)

    return eight


def one_token(weights: Callable[..., Any], sums: Sums) -> Callable[..., Any]:
    """product(m, packed, y, low, high, correction): y[row] = the integer sums of rows low … high - 1 with one token,
    each plus the correction, as f32. Rows are read in eight streams of consecutive ones.
    """
    eight = eight_rows(weights, sums)

    @inline
    def streams(m, table, packed, y, low, high, correction):
        apart = (high - low + 7) // 8
        for i in range(apart):
            row = low + i
            values = to_float(F32x8, eight(m, table, packed, row, apart, high - 1) + correction)
            for digit in range(1, m.digits):
                lower = eight(m, table + digit * m.table_bytes, packed, row, apart, high - 1) + correction
                values = joined_digits(values, to_float(F32x8, lower), F32x8)
            store_lanes(y + row * 4, apart * 4, values, (high - row + apart - 1) // apart)

    @inline
    def product(m, packed, y, low, high, correction):
        row = low
        while row < high:
            index = row // m.rows_per_table
            end = smaller(high, (index + 1) * m.rows_per_table)
            table = m.table + index * m.digits * m.table_bytes
            streams(m, table, packed, y, row, end, splat(I32x8, types.int32(correction)))
            row = end

    return product


def multiply_one(weights: Callable[..., Any], sums: Sums) -> Callable[..., Any]:
    """y[row] = row of the matrix times one token. Arguments: kernels/table.py."""
    product = one_token(weights, sums)

    def kernel(matrix, activation, tokens, y, y_stride, low, high, scratch):
        m, x = view(MATRIX, matrix), view(ACTIVATION, activation)
        product(m, x.packed, y, low, high, m.offset * load(types.int32, x.total))
        scale_rows(m, x, types.int64(0), y, low, high)

    return kernel


def multiply_many(weights: Callable[..., Any], sums: Sums) -> Callable[..., Any]:
    """y[token, row] for many tokens: rows are decoded to bytes in scratch once, then multiplied with each token."""

    register, lanes = sums.register, sums.register.lanes
    columns = 2 * lanes
    decode = row_decoder(weights, register)

    @inline
    def decoded(m, scratch, row, column):
        address = scratch + row * whole_steps(m.end, columns) + whole_steps(column, columns)
        return load(register, address), load(register, address + lanes)

    eight = eight_rows(decoded, sums)

    def kernel(matrix, activation, tokens, y, y_stride, low, high, scratch):
        m, x = view(MATRIX, matrix), view(ACTIVATION, activation)
        for first in range(low, high, 8):
            rows = smaller(high - first, 8)
            for digit in range(m.digits):
                decode(m, first, rows, digit, scratch)
                for token in range(tokens):
                    correction = splat(I32x8, types.int32(m.offset * load(types.int32, x.total + token * 4)))
                    packed, out = x.packed + token * x.packed_stride, y + token * y_stride + first * 4
                    values = to_float(F32x8, eight(m, scratch, packed, 0, 1, rows - 1) + correction)
                    if digit > 0:
                        values = joined_digits(load_first(F32x8, out, rows), values, F32x8)
                    store_first(out, values, rows)
        for token in range(tokens):
            scale_rows(m, x, token, y + token * y_stride, low, high)

    return kernel


@inline
def whole_steps(columns, step):
    return (columns + step - 1) // step * step


@inline
def _identity7(m, table, row, column):
    return ranks.ranks7(m, row, column)


@inline
def _identity8(m, table, row, column):
    return ranks.ranks8(m, row, column)


# Centroids that are consecutive integers need no table: apart from an offset, their ranks are the values.
IDENTITIES = {"7i": _identity7, "8i": _identity8}


def row_decoder(weights: Callable[..., Any], register: Vector) -> Callable[..., Any]:
    """decode(m, first, rows, digit, target): rows as bytes in the order of activations, u8[rows, whole steps]."""
    lanes = register.lanes
    columns = 2 * lanes

    @inline
    def decode(m, first, rows, digit, target):
        for row in range(first, first + rows):
            table = m.table + (row // m.rows_per_table * m.digits + digit) * m.table_bytes
            for begin in range(0, m.end, columns):
                even, odd = weights(m, table, row, smaller(begin, m.end - columns))
                store(target, even)
                store(target + lanes, odd)
                target += columns

    return decode


@inline
def joined_digits(higher, lower, kind):
    """Combine the sums over the next higher digit of the centroids with the sums over this one."""
    return higher * splat(kind, types.float32(256)) + lower


@inline
def with_factors(values, m, x, token, row):
    """Apply the activations' scale and the row factors to the integer sums of sixteen rows."""
    scale = splat(F32x16, load(types.float32, x.scale + token * 4))
    values = values * scale * load(F32x16, m.scale + row * m.scale_step)
    if m.shift != 0:
        total = splat(F32x16, types.float32(load(types.int32, x.total + token * 4)))
        values = values + total * scale * load(F32x16, m.shift + row * m.shift_step)
    return values


@inline
def store_rows(total, m, x, token, y, row, count, digit):
    """Store a token's totals of sixteen rows to y: join the digits, then apply the factors."""
    correction = splat(I32x16, types.int32(m.offset * load(types.int32, x.total + token * 4)))
    values = to_float(F32x16, total + correction)
    if digit > 0:
        values = joined_digits(load_first(F32x16, y, count), values, F32x16)
    if digit == m.digits - 1:
        values = with_factors(values, m, x, token, row)
    store_first(y, values, count)


@inline
def scale_rows(m, x, token, y, low, high):
    """Apply `with_factors` to a token's rows low … high - 1."""
    for row in range(low, high, LANES):
        count = smaller(high - row, LANES)
        values = load_first(F32x16, y + row * 4, count)
        store_first(y + row * 4, with_factors(values, m, x, token, row), count)
