"""Raw memory inside Numba functions: loads, stores, calls of addresses, atomics and waiting.

Addresses are int64. Each intrinsic is one LLVM operation.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.extending import intrinsic

from rkf.runtime.kernels.vectors import I32, I64, Vector, broadcast, call_llvm, constants, instance, pointer_to


@intrinsic
def load(typingctx, kind, address):
    """load <kind>, align 1: a scalar or a vector."""
    result = instance(kind)

    def codegen(context, builder, sig, args):
        llvm_type = context.get_data_type(result)
        return builder.load(pointer_to(builder, args[1], llvm_type), align=1)

    return result(kind, types.int64), codegen


@intrinsic
def load_first(typingctx, kind, address, count):
    """llvm.masked.load: the first `count` lanes, zero in the others; bytes past them are never read."""
    result = instance(kind)

    def codegen(context, builder, sig, args):
        vector = result.llvm
        mask = _first_lanes(builder, result, args[2])
        name = f"llvm.masked.load.v{result.lanes}{result.element}.p0"
        pointer = builder.inttoptr(args[1], vector.as_pointer())
        return call_llvm(builder, name, vector, [pointer, I32(1), mask, ir.Constant(vector, None)])

    return result(kind, types.int64, types.int64), codegen


def _first_lanes(builder: Any, vector: Vector, count: Any) -> Any:
    """A mask of the first `count` lanes, count <= 127."""
    lanes = Vector("i8", vector.lanes)
    narrow = broadcast(builder, lanes, builder.trunc(count, ir.IntType(8)))
    return builder.icmp_unsigned("<", constants(lanes, list(range(vector.lanes))), narrow)


@intrinsic
def store(typingctx, address, value):
    """store, align 1."""

    def codegen(context, builder, sig, args):
        builder.store(args[1], pointer_to(builder, args[0], args[1].type), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


@intrinsic
def store_first(typingctx, address, value, count):
    """llvm.masked.store: the first `count` lanes; memory past them is untouched."""

    def codegen(context, builder, sig, args):
        pointer = pointer_to(builder, args[0], args[1].type)
        name = f"llvm.masked.store.v{value.lanes}{value.element}.p0"
        call_llvm(builder, name, ir.VoidType(), [args[1], pointer, I32(1), _first_lanes(builder, value, args[2])])
        return context.get_dummy_value()

    return types.void(types.int64, value, types.int64), codegen


@intrinsic
def store_lanes(typingctx, address, stride, value, count):
    """Store the first `count` lanes `stride` bytes apart; the memory of the others is untouched."""

    def codegen(context, builder, sig, args):
        address, stride, lanes, count = args
        for i in range(value.lanes):
            with builder.if_then(builder.icmp_signed("<", I64(i), count)):
                lane = builder.extract_element(lanes, I32(i))
                target = builder.add(address, builder.mul(stride, I64(i)))
                builder.store(lane, pointer_to(builder, target, lane.type), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, value, types.int64), codegen


@intrinsic(prefer_literal=True)
def prefetch(typingctx, address, locality):
    """llvm.prefetch for reading: 3 into all cache levels, 2 from the second level on, 0 non-temporal; never faults."""
    level = locality.literal_value

    def codegen(context, builder, sig, args):
        pointer = pointer_to(builder, args[0], ir.IntType(8))
        call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, I32(0), I32(level), I32(1)])
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
        return builder.ptrtoint(slot, I64)

    return types.int64(size), codegen


# --- calls, waiting, and memory that threads share


@intrinsic
def call3(typingctx, function, a, b, c):
    """Call a C function void(i64 x 3) at an address."""

    def codegen(context, builder, sig, args):
        signature_ = ir.FunctionType(ir.VoidType(), [I64] * 3)
        builder.call(builder.inttoptr(args[0], signature_.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def call4(typingctx, function, a, b, c, d):
    """Call a C function void(i64 x 4) at an address."""

    def codegen(context, builder, sig, args):
        signature_ = ir.FunctionType(ir.VoidType(), [I64] * 4)
        builder.call(builder.inttoptr(args[0], signature_.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def call8(typingctx, function, a, b, c, d, e, f, g, h):
    """Call a C function void(i64 x 8) at an address."""

    def codegen(context, builder, sig, args):
        signature_ = ir.FunctionType(ir.VoidType(), [I64] * 8)
        builder.call(builder.inttoptr(args[0], signature_.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), codegen


@intrinsic
def load_shared(typingctx, address):
    """load atomic i64, acquire."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(pointer_to(builder, args[0], I64), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def add_shared(typingctx, address, value):
    """atomicrmw add i64, sequentially consistent; returns the old value."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", pointer_to(builder, args[0], I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def exchange_shared(typingctx, address, expected, value):
    """cmpxchg i64, sequentially consistent; true if the value was as expected and is replaced."""

    def codegen(context, builder, sig, args):
        pointer = pointer_to(builder, args[0], I64)
        return builder.extract_value(builder.cmpxchg(pointer, args[1], args[2], "seq_cst", "seq_cst"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def pause(typingctx):
    """The CPU's hint for a spinning loop (pause, yield); kernels/build.py defines it for each target."""

    def codegen(context, builder, sig, args):
        call_llvm(builder, "rkf_pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def ticks(typingctx):
    """A clock of constant rate; kernels/build.py defines it for each target."""

    def codegen(context, builder, sig, args):
        return call_llvm(builder, "rkf_ticks", I64, [])

    return types.int64(), codegen


@intrinsic
def give_way(typingctx):
    """Let another thread use this core; kernels/build.py defines it for each target."""

    def codegen(context, builder, sig, args):
        call_llvm(builder, "rkf_give_way", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), codegen
