"""Rope on the heads of one token's row, as a micro-op: rotates pairs by tables of cosines and sines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rkf.runtime.kernels.inline import inline
from rkf.runtime.kernels.memory import load, store
from rkf.runtime.kernels.operands import number, row_of, word
from rkf.runtime.kernels.simd import splat
from rkf.runtime.kernels.vectors import F32x16
from rkf.runtime.kernels.views import view
from rkf.runtime.structs import LANES, ROPE, THREAD


@inline
def _turn_halves(head, out, cosines, half, scale):
    """Pairs (i, i + half), Hugging Face's order, times a scale; the sines follow the cosines."""
    whole = half // LANES * LANES
    for i in range(0, whole, LANES):
        a, b = load(F32x16, head + i * 4), load(F32x16, head + (i + half) * 4)
        cosine, sine = load(F32x16, cosines + i * 4), load(F32x16, cosines + (i + half) * 4)
        factor = splat(F32x16, scale)
        store(out + i * 4, (a * cosine - b * sine) * factor)
        store(out + (i + half) * 4, (b * cosine + a * sine) * factor)
    for i in range(whole, half):
        a, b = number(head, i), number(head, i + half)
        cosine, sine = number(cosines, i), number(cosines, i + half)
        store(out + i * 4, (a * cosine - b * sine) * scale)
        store(out + (i + half) * 4, (b * cosine + a * sine) * scale)


@inline
def _turn_neighbours(head, out, cosines, half, scale):
    """Pairs (2i, 2i + 1)."""
    for i in range(half):
        a, b = number(head, 2 * i), number(head, 2 * i + 1)
        cosine, sine = number(cosines, i), number(cosines, i + half)
        store(out + 2 * i * 4, (a * cosine - b * sine) * scale)
        store(out + (2 * i + 1) * 4, (b * cosine + a * sine) * scale)


PAIRS = {"halves": _turn_halves, "neighbours": _turn_neighbours}


def rope(pairs: str) -> Callable[..., Any]:
    """out = scale * the source, with the first 2 * turned numbers of each head rotated by the token's position."""
    turn = PAIRS[pairs]

    def kernel(token, arguments, batch_address, thread_address):
        m, thread = view(ROPE, arguments), view(THREAD, thread_address)
        half = m.turned
        table = word(word(m.sequences, token), m.table)
        cosines = table + word(m.positions, token) * half * 8
        source, out = row_of(m.source, thread, token), row_of(m.out, thread, token)
        for head in range(m.heads):
            at = head * m.head_dim * 4
            turn(source + at, out + at, cosines, half, m.scale)
            for i in range(2 * half, m.head_dim):
                store(out + at + i * 4, number(source + at, i) * m.scale)

    return kernel
