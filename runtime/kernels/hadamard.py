"""The Walsh-Hadamard transform of a token's row, in blocks, as a micro-op: n log n additions."""

from __future__ import annotations

from numba.core.extending import intrinsic

from rkf.runtime.kernels.inline import inline
from rkf.runtime.kernels.memory import load, store
from rkf.runtime.kernels.operands import row_of
from rkf.runtime.kernels.simd import splat
from rkf.runtime.kernels.vectors import F32x16, constants, shuffle
from rkf.runtime.kernels.views import view
from rkf.runtime.structs import HADAMARD, LANES, THREAD

_STEP = LANES * 4


@intrinsic(prefer_literal=True)
def _sums(typingctx, x, distance):
    """Lanes i and j = i + distance, where i lacks that bit, become x[i] + x[j] and x[i] - x[j]."""
    bit = distance.literal_value

    def codegen(context, builder, sig, args):
        partners = shuffle(builder, args[0], args[0], [i ^ bit for i in range(x.lanes)])
        signs = constants(x, [-1.0 if i & bit else 1.0 for i in range(x.lanes)])
        return builder.fadd(partners, builder.fmul(args[0], signs))

    return x(x, distance), codegen


@inline
def _in_register(x, block):
    """The rounds whose pairs lie in one register."""
    if block > 1:
        x = _sums(x, 1)
    if block > 2:
        x = _sums(x, 2)
    if block > 4:
        x = _sums(x, 4)
    if block > 8:
        x = _sums(x, 8)
    return x


def hadamard(token, arguments, batch_address, thread_address):
    """out = scale * H source, for each `block` neighbours of a row; H has no scale of its own."""
    m, thread = view(HADAMARD, arguments), view(THREAD, thread_address)
    source, out = row_of(m.source, thread, token), row_of(m.out, thread, token)
    for i in range(0, m.columns * 4, _STEP):
        store(out + i, _in_register(load(F32x16, source + i), m.block) * splat(F32x16, m.scale))
    distance = _STEP
    while distance < m.block * 4:
        for start in range(0, m.columns * 4, 2 * distance):
            for i in range(start, start + distance, _STEP):
                a, b = load(F32x16, out + i), load(F32x16, out + i + distance)
                store(out + i, a + b)
                store(out + i + distance, a - b)
        distance *= 2
