"""Register types inside Numba functions, their operators, and helpers with which intrinsics build LLVM IR.

Operations are plain LLVM IR with one meaning on every CPU (LLVM splits a register that is too wide). There is no
fast-math: every f32 sum is added in the written order, so all CPUs give the same bits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.extending import lower_builtin, register_model
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
I32, I64 = ir.IntType(32), ir.IntType(64)


class Vector(types.Type):
    """A register of `lanes` elements. Integers have no sign; the operations are signed or unsigned."""

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
I16x8, I16x16, I16x32 = (Vector("i16", n) for n in (8, 16, 32))
I32x4, I32x8, I32x16 = (Vector("i32", n) for n in (4, 8, 16))
I64x8 = Vector("i64", 8)
F16x16 = Vector("f16", 16)
F32x8, F32x16 = Vector("f32", 8), Vector("f32", 16)
MASK16, MASK64 = Vector("i1", 16), Vector("i1", 64)


def constants(vector: Vector, values: Any) -> ir.Constant:
    if isinstance(values, int | float):
        values = [values] * vector.lanes
    return ir.Constant(vector.llvm, [ir.Constant(vector.llvm.element, v) for v in values])


def broadcast(builder: Any, vector: Vector, scalar: Any) -> Any:
    lane0 = builder.insert_element(ir.Constant(vector.llvm, ir.Undefined), scalar, I32(0))
    zeros = ir.Constant(ir.VectorType(I32, vector.lanes), [I32(0)] * vector.lanes)
    return builder.shuffle_vector(lane0, lane0, zeros)


def shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """shufflevector: result lane i is lane lanes[i] of a ++ b."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), [I32(i) for i in lanes]))


def part_of(builder: Any, value: Any, index: int, lanes: int) -> Any:
    """The index-th piece with this number of lanes."""
    return shuffle(builder, value, value, list(range(index * lanes, (index + 1) * lanes)))


def side_by_side(builder: Any, values: list[Any]) -> Any:
    """Joins registers into one; their number is a power of two."""
    while len(values) > 1:
        lanes = list(range(2 * values[0].type.count))
        values = [shuffle(builder, a, b, lanes) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def call_llvm(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    """Call an LLVM intrinsic (or an external C function) by name."""
    signature_ = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature_, name), args)


def pointer_to(builder: Any, address: Any, pointee: Any) -> Any:
    return builder.inttoptr(address, pointee.as_pointer())


def instance(kind: Any) -> Any:
    """The Numba type that `load(kind, …)` returns: a vector, or a scalar such as types.float32."""
    return kind.instance_type


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
        return getattr(builder, name)(args[0], broadcast(builder, sig.return_type, count))


_shift(operator.lshift, "shl")
_shift(operator.rshift, "lshr")
