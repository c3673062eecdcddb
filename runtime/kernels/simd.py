"""SIMD values, raw memory and atomics inside Numba functions: types, operators, and intrinsics of one LLVM operation
each.

Addresses are int64. Vector operations are plain LLVM IR with one meaning on every CPU (LLVM splits a register that is
too wide); the few that need an instruction set say so in their name's doc and are called by that level's kernels only.
No fast-math anywhere: the order of every f32 sum is the one written, so all CPUs give the same bits.
"""

from __future__ import annotations

import operator
import platform
import sys
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.extending import intrinsic, lower_builtin, register_model
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

_ELEMENTS = {
    "i1": ir.IntType(1),
    "i8": ir.IntType(8),
    "i16": ir.IntType(16),
    "i32": ir.IntType(32),
    "i64": ir.IntType(64),
    "f16": ir.HalfType(),
    "f32": ir.FloatType(),
}
_I32, _I64 = ir.IntType(32), ir.IntType(64)


class Vector(types.Type):
    """A register of `lanes` elements. Integers carry no sign: operations do."""

    def __init__(self, element: str, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(name=f"{element}x{lanes}")

    @property
    def floating(self) -> bool:
        return self.element.startswith("f")

    @property
    def llvm(self) -> ir.VectorType:
        return ir.VectorType(_ELEMENTS[self.element], self.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Vector) -> None:
        super().__init__(manager, fe_type, fe_type.llvm)


I8x8, I8x16, I8x32, I8x64 = (Vector("i8", n) for n in (8, 16, 32, 64))
I16x16, I16x32 = Vector("i16", 16), Vector("i16", 32)
I32x4, I32x8, I32x16 = (Vector("i32", n) for n in (4, 8, 16))
F16x16 = Vector("f16", 16)
F32x8, F32x16 = Vector("f32", 8), Vector("f32", 16)
MASK16, MASK64 = Vector("i1", 16), Vector("i1", 64)


def _constant(vector: Vector, values: Any) -> ir.Constant:
    if isinstance(values, int | float):
        values = [values] * vector.lanes
    return ir.Constant(vector.llvm, [ir.Constant(vector.llvm.element, v) for v in values])


def _splat(builder: Any, vector: Vector, scalar: Any) -> Any:
    lane0 = builder.insert_element(ir.Constant(vector.llvm, ir.Undefined), scalar, _I32(0))
    zeros = ir.Constant(ir.VectorType(_I32, vector.lanes), [_I32(0)] * vector.lanes)
    return builder.shuffle_vector(lane0, lane0, zeros)


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """shufflevector: result lane i is lane lanes[i] of a ++ b."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), [_I32(i) for i in lanes]))


def part_of(builder: Any, value: Any, index: int, lanes: int) -> Any:
    """The index-th piece of so many lanes."""
    return _shuffle(builder, value, value, list(range(index * lanes, (index + 1) * lanes)))


def side_by_side(builder: Any, values: list[Any]) -> Any:
    """Registers as one, a power of two of them."""
    while len(values) > 1:
        lanes = list(range(2 * values[0].type.count))
        values = [_shuffle(builder, a, b, lanes) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def call_llvm(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    """Call an LLVM intrinsic (or an external C function) by name."""
    signature_ = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature_, name), args)


def _pointer(builder: Any, address: Any, pointee: Any) -> Any:
    return builder.inttoptr(address, pointee.as_pointer())


# --- operators: a + b, a - b, a * b, a & b, a | b, a ^ b on equal vectors, v << n and v >> n (logical) by a constant


def _operator(op: Callable[..., Any], integer: str, floating: str | None) -> None:
    @infer_global(op)
    class _Typing(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
                return signature(args[0], *args)
            return None

    @lower_builtin(op, Vector, Vector)
    def _lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        name = floating if sig.return_type.floating else integer
        return getattr(builder, name)(*args)


for _op, _integer, _floating in (
    (operator.add, "add", "fadd"),
    (operator.sub, "sub", "fsub"),
    (operator.mul, "mul", "fmul"),
    (operator.truediv, "sdiv", "fdiv"),
    (operator.and_, "and_", None),
    (operator.or_, "or_", None),
    (operator.xor, "xor", None),
):
    _operator(_op, _integer, _floating)


def _comparison(op: Callable[..., Any], symbol: str) -> None:
    @infer_global(op)
    class _Typing(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
                return signature(Vector("i1", args[0].lanes), *args)
            return None

    @lower_builtin(op, Vector, Vector)
    def _lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        compare = builder.fcmp_ordered if sig.args[0].floating else builder.icmp_signed
        return compare(symbol, *args)


_comparison(operator.eq, "==")
_comparison(operator.lt, "<")


def _shift(op: Callable[..., Any], name: str) -> None:
    @infer_global(op)
    class _Typing(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and isinstance(args[0], Vector) and isinstance(args[1], types.Integer):
                return signature(args[0], args[0], types.int64)
            return None

    @lower_builtin(op, Vector, types.Integer)
    def _lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        element = sig.return_type.llvm.element
        count = args[1] if element.width == 64 else builder.trunc(args[1], element)
        return getattr(builder, name)(args[0], _splat(builder, sig.return_type, count))


_shift(operator.lshift, "shl")
_shift(operator.rshift, "lshr")


# --- memory


def _loaded(kind: Any) -> Any:
    """The Numba type that `load(kind, …)` returns: a vector, or a scalar such as types.float32."""
    return kind.instance_type


@intrinsic
def load(typingctx, kind, address):
    """load <kind>, align 1: a scalar or a vector."""
    result = _loaded(kind)

    def codegen(context, builder, sig, args):
        llvm_type = context.get_data_type(result)
        return builder.load(_pointer(builder, args[1], llvm_type), align=1)

    return result(kind, types.int64), codegen


@intrinsic
def load_first(typingctx, kind, address, count):
    """llvm.masked.load: the first `count` lanes, zero in the others; bytes past them are never read."""
    result = _loaded(kind)

    def codegen(context, builder, sig, args):
        vector = result.llvm
        mask = _first_lanes(builder, result, args[2])
        name = f"llvm.masked.load.v{result.lanes}{result.element}.p0"
        pointer = builder.inttoptr(args[1], vector.as_pointer())
        return call_llvm(builder, name, vector, [pointer, _I32(1), mask, ir.Constant(vector, None)])

    return result(kind, types.int64, types.int64), codegen


def _first_lanes(builder: Any, vector: Vector, count: Any) -> Any:
    """A mask of the first `count` lanes, count <= 127."""
    lanes = Vector("i8", vector.lanes)
    narrow = _splat(builder, lanes, builder.trunc(count, ir.IntType(8)))
    return builder.icmp_unsigned("<", _constant(lanes, list(range(vector.lanes))), narrow)


@intrinsic
def store(typingctx, address, value):
    """store, align 1."""

    def codegen(context, builder, sig, args):
        builder.store(args[1], _pointer(builder, args[0], args[1].type), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


@intrinsic
def store_first(typingctx, address, value, count):
    """llvm.masked.store: the first `count` lanes; memory past them is untouched."""

    def codegen(context, builder, sig, args):
        pointer = _pointer(builder, args[0], args[1].type)
        name = f"llvm.masked.store.v{value.lanes}{value.element}.p0"
        call_llvm(builder, name, ir.VoidType(), [args[1], pointer, _I32(1), _first_lanes(builder, value, args[2])])
        return context.get_dummy_value()

    return types.void(types.int64, value, types.int64), codegen


@intrinsic
def store_lanes(typingctx, address, stride, value, count):
    """The first `count` lanes, each `stride` bytes after the one before; the others' memory is untouched."""

    def codegen(context, builder, sig, args):
        address, stride, lanes, count = args
        for i in range(value.lanes):
            with builder.if_then(builder.icmp_signed("<", _I64(i), count)):
                lane = builder.extract_element(lanes, _I32(i))
                target = builder.add(address, builder.mul(stride, _I64(i)))
                builder.store(lane, _pointer(builder, target, lane.type), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, value, types.int64), codegen


@intrinsic(prefer_literal=True)
def prefetch(typingctx, address, locality):
    """llvm.prefetch for reading: 3 into all cache levels, 2 from the second on, 0 non-temporal; never faults."""
    level = locality.literal_value

    def codegen(context, builder, sig, args):
        pointer = _pointer(builder, args[0], ir.IntType(8))
        call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, _I32(0), _I32(level), _I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64, locality), codegen


@intrinsic(prefer_literal=True)
def local_bytes(typingctx, size):
    """alloca of a constant number of bytes, 64-byte aligned; returns its address."""
    count = size.literal_value

    def codegen(context, builder, sig, args):
        with builder.goto_entry_block():
            slot = builder.alloca(ir.ArrayType(ir.IntType(8), count))
            slot.align = 64
        return builder.ptrtoint(slot, _I64)

    return types.int64(size), codegen


# --- calls, waiting, and memory that threads share


@intrinsic
def call3(typingctx, function, a, b, c):
    """Call a C function void(i64 x 3) at an address."""

    def codegen(context, builder, sig, args):
        signature_ = ir.FunctionType(ir.VoidType(), [_I64] * 3)
        builder.call(builder.inttoptr(args[0], signature_.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def call4(typingctx, function, a, b, c, d):
    """Call a C function void(i64 x 4) at an address."""

    def codegen(context, builder, sig, args):
        signature_ = ir.FunctionType(ir.VoidType(), [_I64] * 4)
        builder.call(builder.inttoptr(args[0], signature_.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def call8(typingctx, function, a, b, c, d, e, f, g, h):
    """Call a C function void(i64 x 8) at an address."""

    def codegen(context, builder, sig, args):
        signature_ = ir.FunctionType(ir.VoidType(), [_I64] * 8)
        builder.call(builder.inttoptr(args[0], signature_.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), codegen


@intrinsic
def load_shared(typingctx, address):
    """load atomic i64, acquire."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(_pointer(builder, args[0], _I64), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def add_shared(typingctx, address, value):
    """atomicrmw add i64, sequentially consistent; returns the old value."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", _pointer(builder, args[0], _I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def exchange_shared(typingctx, address, expected, value):
    """cmpxchg i64, sequentially consistent; true if the value was as expected and is replaced."""

    def codegen(context, builder, sig, args):
        pointer = _pointer(builder, args[0], _I64)
        return builder.extract_value(builder.cmpxchg(pointer, args[1], args[2], "seq_cst", "seq_cst"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def pause(typingctx):
    """The CPU's hint for a spinning loop (pause, yield), where LLVM has one."""

    def codegen(context, builder, sig, args):
        machine = platform.machine().lower()
        if machine in ("x86_64", "amd64"):
            call_llvm(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        elif machine in ("aarch64", "arm64"):
            call_llvm(builder, "llvm.aarch64.hint", ir.VoidType(), [_I32(1)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def ticks(typingctx):
    """A clock of constant rate: llvm.readcyclecounter (rdtsc) on x86, llvm.readsteadycounter (cntvct_el0) on ARM."""

    def codegen(context, builder, sig, args):
        name = "steady" if platform.machine().lower() in ("aarch64", "arm64") else "cycle"
        return call_llvm(builder, f"llvm.read{name}counter", _I64, [])

    return types.int64(), codegen


@intrinsic
def give_way(typingctx):
    """sched_yield (SwitchToThread on Windows): let another thread have this core."""

    def codegen(context, builder, sig, args):
        call_llvm(builder, "SwitchToThread" if sys.platform == "win32" else "sched_yield", _I32, [])
        return context.get_dummy_value()

    return types.void(), codegen


# --- lanes


@intrinsic
def splat(typingctx, kind, scalar):
    """One scalar in all lanes."""
    result = _loaded(kind)
    element = {"f32": types.float32, "i8": types.int8, "i16": types.int16, "i32": types.int32}[result.element]

    def codegen(context, builder, sig, args):
        return _splat(builder, result, args[1])

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
    """A mask of the first `count` lanes (count is cut to 0..lanes)."""
    result = _loaded(kind)

    def codegen(context, builder, sig, args):
        lanes = _constant(Vector("i64", result.lanes), list(range(result.lanes)))
        return builder.icmp_signed("<", lanes, _splat(builder, Vector("i64", result.lanes), args[1]))

    return result(kind, types.int64), codegen


@intrinsic
def any_bit(typingctx, a, b):
    """icmp ne (a & b), 0: a mask of the lanes where they share a bit."""

    def codegen(context, builder, sig, args):
        return builder.icmp_signed("!=", builder.and_(*args), _constant(a, 0))

    return Vector("i1", a.lanes)(a, a), codegen


@intrinsic
def repeat_lanes(typingctx, kind, value):
    """shufflevector: every lane several times, to fill the wider register."""
    result = _loaded(kind)

    def codegen(context, builder, sig, args):
        times = result.lanes // value.lanes
        return _shuffle(builder, args[1], args[1], [i // times for i in range(result.lanes)])

    return result(kind, value), codegen


@intrinsic(prefer_literal=True)
def part(typingctx, kind, value, index):
    """shufflevector: the index-th piece of a wider register."""
    result, first = _loaded(kind), index.literal_value * _loaded(kind).lanes

    def codegen(context, builder, sig, args):
        return _shuffle(builder, args[1], args[1], list(range(first, first + result.lanes)))

    return result(kind, value, index), codegen


@intrinsic
def join(typingctx, kind, a, b):
    """shufflevector: two registers side by side in one of twice the width."""
    result = _loaded(kind)

    def codegen(context, builder, sig, args):
        return _shuffle(builder, args[1], args[2], list(range(result.lanes)))

    return result(kind, a, b), codegen


@intrinsic
def bitcast(typingctx, kind, value):
    """The same bits as another type of the same size."""
    result = _loaded(kind)

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[1], context.get_data_type(result))

    return result(kind, value), codegen


@intrinsic
def zero_extend(typingctx, kind, value):
    """zext, lane by lane."""
    result = _loaded(kind)

    def codegen(context, builder, sig, args):
        return builder.zext(args[1], result.llvm)

    return result(kind, value), codegen


@intrinsic
def sign_extend(typingctx, kind, value):
    """sext, lane by lane."""
    result = _loaded(kind)

    def codegen(context, builder, sig, args):
        return builder.sext(args[1], result.llvm)

    return result(kind, value), codegen


@intrinsic
def truncate(typingctx, kind, value):
    """trunc, lane by lane."""
    result = _loaded(kind)

    def codegen(context, builder, sig, args):
        return builder.trunc(args[1], result.llvm)

    return result(kind, value), codegen


@intrinsic
def to_float(typingctx, kind, value):
    """sitofp, lane by lane, nearest even."""
    result = _loaded(kind)

    def codegen(context, builder, sig, args):
        return builder.sitofp(args[1], result.llvm)

    return result(kind, value), codegen


@intrinsic
def widen(typingctx, kind, value):
    """fpext, lane by lane (f16 to f32 needs F16C on x86)."""
    result = _loaded(kind)

    def codegen(context, builder, sig, args):
        return builder.fpext(args[1], result.llvm)

    return result(kind, value), codegen


@intrinsic
def narrow(typingctx, kind, value):
    """fptrunc, lane by lane, nearest even (f32 to f16 needs F16C on x86)."""
    result = _loaded(kind)

    def codegen(context, builder, sig, args):
        return builder.fptrunc(args[1], result.llvm)

    return result(kind, value), codegen


@intrinsic
def insert_lane(typingctx, value, index, scalar):
    """insertelement."""

    def codegen(context, builder, sig, args):
        return builder.insert_element(args[0], args[2], builder.trunc(args[1], _I32))

    return value(value, types.int64, types.int32), codegen


@intrinsic
def first_lane(typingctx, value):
    """extractelement 0."""
    result = {"f32": types.float32, "f16": types.float16, "i16": types.int16, "i32": types.int32}[value.element]

    def codegen(context, builder, sig, args):
        return builder.extract_element(args[0], _I32(0))

    return result(value), codegen


@intrinsic
def arithmetic_shift_right(typingctx, value, count):
    """ashr by a constant, lane by lane."""

    def codegen(context, builder, sig, args):
        return builder.ashr(args[0], _splat(builder, value, builder.trunc(args[1], value.llvm.element)))

    return value(value, types.int64), codegen


@intrinsic
def even_lanes(typingctx, a, b):
    """shufflevector: lanes 0, 2, 4, … of a ++ b."""

    def codegen(context, builder, sig, args):
        return _shuffle(builder, *args, [2 * i for i in range(a.lanes)])

    return a(a, a), codegen


@intrinsic
def odd_lanes(typingctx, a, b):
    """shufflevector: lanes 1, 3, 5, … of a ++ b."""

    def codegen(context, builder, sig, args):
        return _shuffle(builder, *args, [2 * i + 1 for i in range(a.lanes)])

    return a(a, a), codegen


def _halve(builder: Any, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Fold a register to a scalar: lane i with lane i + half, until one is left."""
    lanes = vector.type.count
    while lanes > 1:
        lanes //= 2
        upper = _shuffle(builder, vector, vector, list(range(lanes, 2 * lanes)))
        vector = combine(_shuffle(builder, vector, vector, list(range(lanes))), upper)
    return builder.extract_element(vector, _I32(0))


@intrinsic
def lane_sum(typingctx, a):
    """The sum of all lanes, halves added pairwise: one order on every CPU."""

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
    """Eight i32 registers to the eight sums of their lanes: adds of unzipped pairs, a shuffle tree without scalars."""

    def codegen(context, builder, sig, args):
        rows = list(args)
        lanes = a.lanes
        while len(rows) > 1 and len(rows) * lanes > 8:
            # Even and odd lanes of two registers, added: each half of the result belongs to one of them.
            evens, odds = [2 * i for i in range(lanes)], [2 * i + 1 for i in range(lanes)]
            rows = [
                builder.add(_shuffle(builder, x, y, evens), _shuffle(builder, x, y, odds))
                for x, y in zip(rows[::2], rows[1::2], strict=True)
            ]
        left = side_by_side(builder, rows)  # neighbouring lanes belong to each row
        while left.type.count > 8:
            half = left.type.count // 2
            left = builder.add(
                _shuffle(builder, left, left, [2 * i for i in range(half)]),
                _shuffle(builder, left, left, [2 * i + 1 for i in range(half)]),
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
            address = builder.add(args[0], builder.mul(args[1], _I64(i)))
            rows.append(builder.load(_pointer(builder, address, vector), align=1))
        for distance in (8, 4, 2, 1):
            # Swap the off-diagonal halves of every 2 x 2 arrangement of blocks `distance` wide.
            low = [(i // distance % 2) * 16 + i - i // distance % 2 * distance for i in range(16)]
            high = [i + distance if i // distance % 2 == 0 else i + 16 for i in range(16)]
            for i in range(16):
                if i // distance % 2 == 0:
                    a, b = rows[i], rows[i + distance]
                    rows[i], rows[i + distance] = _shuffle(builder, a, b, low), _shuffle(builder, a, b, high)
        for i, row in enumerate(rows):
            builder.store(row, _pointer(builder, builder.add(args[2], _I64(64 * i)), vector), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


# --- one instruction set


@intrinsic
def permute_bytes(typingctx, table, index):
    """llvm.x86.avx512.permvar.qi.512 (vpermb, AVX512-VBMI): table[index & 63], 64 lanes."""

    def codegen(context, builder, sig, args):
        return call_llvm(builder, "llvm.x86.avx512.permvar.qi.512", I8x64.llvm, [args[0], args[1]])

    return I8x64(I8x64, I8x64), codegen


@intrinsic
def dot_bytes(typingctx, total, unsigned, signed):
    """llvm.x86.avx512.vpdpbusd.512 (AVX512-VNNI): total[i] += sum of four u8 * i8 products, wrapping."""

    def codegen(context, builder, sig, args):
        return call_llvm(builder, "llvm.x86.avx512.vpdpbusd.512", I32x16.llvm, list(args))

    return I32x16(I32x16, I8x64, I8x64), codegen


@intrinsic
def permute_16(typingctx, table, index):
    """llvm.x86.avx2.pshuf.b (vpshufb): within each half of 16 lanes, table[index & 15], zero where the index' top bit
    is set.
    """

    def codegen(context, builder, sig, args):
        return call_llvm(builder, "llvm.x86.avx2.pshuf.b", I8x32.llvm, list(args))

    return I8x32(I8x32, I8x32), codegen


@intrinsic
def dot_pairs(typingctx, a, b):
    """llvm.x86.avx2.pmadd.wd (vpmaddwd): sums of two neighbouring i16 * i16 products."""

    def codegen(context, builder, sig, args):
        return call_llvm(builder, "llvm.x86.avx2.pmadd.wd", I32x8.llvm, list(args))

    return I32x8(I16x16, I16x16), codegen
