"""Operations of one instruction set, named in their docstrings. Only the kernels of that level call them."""

from __future__ import annotations

from typing import Any

from numba.core.extending import intrinsic

from rkf.runtime.kernels.vectors import (
    I32,
    I8x32,
    I8x64,
    I16x16,
    I16x32,
    I32x8,
    I32x16,
    call_llvm,
)


@intrinsic
def permute_bytes(typingctx, table, index):
    """llvm.x86.avx512.permvar.qi.512 (vpermb, AVX512-VBMI): table[index & 63], 64 lanes."""

    def codegen(context, builder, sig, args):
        return call_llvm(builder, "llvm.x86.avx512.permvar.qi.512", I8x64.llvm, [args[0], args[1]])

    return I8x64(I8x64, I8x64), codegen


@intrinsic
def shifted_bytes(typingctx, data, shifts):
    """llvm.x86.avx512.pmultishift.qb.512 (AVX512-VBMI): in each eight bytes, byte i is the low byte of the eight
    rotated right by shifts[i] & 63 bits.
    """

    def codegen(context, builder, sig, args):
        return call_llvm(builder, "llvm.x86.avx512.pmultishift.qb.512", I8x64.llvm, [args[1], args[0]])

    return I8x64(I8x64, I8x64), codegen


@intrinsic
def merged_bits(typingctx, mask, a, b):
    """llvm.x86.avx512.pternlog.d.512: bits of a where the mask is set, of b elsewhere. Of plain operations with a
    constant mask LLVM makes two instructions.
    """

    def codegen(context, builder, sig, args):
        words = [builder.bitcast(each, I32x16.llvm) for each in args]
        merged = call_llvm(builder, "llvm.x86.avx512.pternlog.d.512", I32x16.llvm, [*words, I32(0xCA)])
        return builder.bitcast(merged, I8x64.llvm)

    return I8x64(I8x64, I8x64, I8x64), codegen


def _dot(builder: Any, name: str, total: Any, a: Any, b: Any) -> Any:
    """A sum of products. Its operands are declared as i32: LLVM 20 knows no other form, and later ones upgrade it."""
    operands = [total, *(builder.bitcast(each, total.type) for each in (a, b))]
    return call_llvm(builder, name, total.type, operands)


@intrinsic
def dot_bytes(typingctx, total, unsigned, signed):
    """llvm.x86.avx512.vpdpbusd.512 (AVX512-VNNI): total[i] += sum of four u8 * i8 products, wrapping."""

    def codegen(context, builder, sig, args):
        return _dot(builder, "llvm.x86.avx512.vpdpbusd.512", *args)

    return I32x16(I32x16, I8x64, I8x64), codegen


@intrinsic
def dot_bytes_32(typingctx, total, unsigned, signed):
    """llvm.x86.avx512.vpdpbusd.256 (AVX-VNNI): dot_bytes of half the width."""

    def codegen(context, builder, sig, args):
        return _dot(builder, "llvm.x86.avx512.vpdpbusd.256", *args)

    return I32x8(I32x8, I8x32, I8x32), codegen


@intrinsic
def permute_16(typingctx, table, index):
    """llvm.x86.avx2.pshuf.b (vpshufb): within each half of 16 lanes, table[index & 15], zero where the index' top bit
    is set.
    """

    def codegen(context, builder, sig, args):
        return call_llvm(builder, "llvm.x86.avx2.pshuf.b", I8x32.llvm, list(args))

    return I8x32(I8x32, I8x32), codegen


@intrinsic
def dot_byte_pairs(typingctx, unsigned, signed):
    """llvm.x86.avx2.pmadd.ub.sw (vpmaddubsw): sums of two neighbouring u8 * i8 products as i16, saturated."""

    def codegen(context, builder, sig, args):
        return call_llvm(builder, "llvm.x86.avx2.pmadd.ub.sw", I16x16.llvm, list(args))

    return I16x16(I8x32, I8x32), codegen


@intrinsic
def dot_pairs(typingctx, a, b):
    """llvm.x86.avx2.pmadd.wd (vpmaddwd): sums of two neighbouring i16 * i16 products."""

    def codegen(context, builder, sig, args):
        return call_llvm(builder, "llvm.x86.avx2.pmadd.wd", I32x8.llvm, list(args))

    return I32x8(I16x16, I16x16), codegen


@intrinsic
def dot_pairs_512(typingctx, total, a, b):
    """llvm.x86.avx512.vpdpwssd.512 (AVX512-VNNI): total[i] += sum of two neighbouring i16 * i16 products, wrapping."""

    def codegen(context, builder, sig, args):
        return _dot(builder, "llvm.x86.avx512.vpdpwssd.512", *args)

    return I32x16(I32x16, I16x32, I16x32), codegen


@intrinsic
def dot_pairs_256(typingctx, total, a, b):
    """llvm.x86.avx512.vpdpwssd.256 (AVX-VNNI): dot_pairs_512 of half the width."""

    def codegen(context, builder, sig, args):
        return _dot(builder, "llvm.x86.avx512.vpdpwssd.256", *args)

    return I32x8(I32x8, I16x16, I16x16), codegen
