"""The structs of attention: its micro-ops, and the phase of its heads."""

from __future__ import annotations

from rkf.model.ops import Attention
from rkf.runtime.buffers import LINE, Place, padded
from rkf.runtime.items import CACHE, Micro, Work
from rkf.runtime.kv_cache import padded_value_dim
from rkf.runtime.section import PlanSection
from rkf.runtime.structs import ATTENTION, COUNTED, PAGE, PARTIAL_HEADER, PARTS, SCALE


def partial_bytes(op: Attention) -> int:
    """Memory of one head's partial attention."""
    return PARTIAL_HEADER + padded_value_dim(op) * 4


def score_bytes(op: Attention) -> int:
    """A thread's memory of one query: its scores of a page, and its numbers as factors."""
    return PAGE * 4 + padded(op.head_dim * 4, LINE)


def attention_micro(section: PlanSection, micro: Micro, op: Attention, own: bool) -> int:
    """The arguments for writing to the cache, merging partial results, or a query's temperature."""
    if micro.what == "keep":
        return _struct(section, op, k=section.places[micro.reads[0]], v=section.places[micro.reads[1]])
    if micro.what == "join":
        return _struct(section, op, out=section.write(op.dst, op.heads * op.value_dim, own=own))
    query = micro.reads[0]
    source, columns = section.places[query], section.columns[query]
    factors = section.ground.arrays.temperature(op)
    out = section.write(query, columns, own=own)
    return section.struct(
        SCALE, source=source, out=out, columns=columns, factors=factors.ctypes.data, by_token=1, scale=1.0
    )


def attention_work(section: PlanSection, work: Work, op: Attention, kernel: int) -> tuple[int, ...]:
    """The PHASE of an attention's heads."""
    (query,) = (section.places[value] for value in work.reads if value != CACHE)
    part = PARTS.index("attention")
    if work.what == "attend:one":
        return kernel, _struct(section, op, q=query), COUNTED.index("pages"), op.kv_heads, _seen(op), 0, part
    arguments = _struct(section, op, q=query, out=section.write(op.dst, op.heads * op.value_dim))
    return kernel, arguments, COUNTED.index("blocks"), op.kv_heads, 0, 0, part


def _seen(op: Attention) -> int:
    """The positions that a token sees, as kernels read it (ATTENTION)."""
    return op.window or -(op.chunk or 0)


def _struct(section: PlanSection, op: Attention, **places: Place) -> int:
    ground = section.ground
    slot, arrays = ground.layout.slots[op.shares if op.shares is not None else section.layer or 0], ground.arrays
    return section.struct(
        ATTENTION,
        **places,
        sequences=arrays.sequences.ctypes.data,
        positions=arrays.positions.ctypes.data,
        blocks=arrays.blocks.ctypes.data,
        group=slot.group,
        offset=slot.offset,
        head_bytes=slot.head_bytes,
        heads=op.heads,
        kv_heads=op.kv_heads,
        head_dim=op.head_dim,
        value_dim=op.value_dim,
        padded=padded_value_dim(op),
        seen=_seen(op),
        sinks=section.vector(op.sinks),
        partials=ground.partials,
        partial_bytes=partial_bytes(op),
        score_bytes=score_bytes(op),
        threads=ground.threads,
        softcap=op.softcap or 0.0,
    )
