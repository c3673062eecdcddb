"""The structs of micro-ops: work on one token's row."""

from __future__ import annotations

from math import inf

import numpy as np

from rkf.model.ops import Add, Attention, Clip, Concat, Embed, Experts, Gate, Hadamard, Linear, Norm, Rope, Route, Scale
from rkf.runtime.buffers import Place, padded
from rkf.runtime.items import Inside, Micro
from rkf.runtime.lower_attention import attention_micro
from rkf.runtime.lower_experts import experts_micro, route_micro
from rkf.runtime.section import PlanSection
from rkf.runtime.structs import BLOCK, CONCAT, EMBED, HADAMARD, NORM, PACK, PAIR, ROPE, SCALE, TAKE, XIELU


def micro_kernel(micro: Micro, cache_format: str) -> str:
    """The name of a micro-op's kernel."""
    match micro.what, micro.op:
        case "keep", _:
            return f"remember:{cache_format}"
        case "temper", _:
            return "scale"
        case "pack", Hadamard():
            return "pack:rounded"
        case "pack_chosen", _:
            return "pack"
        case _, Norm(centred=centred, group=group):
            return "norm:centred" if centred else "norm:rms" if group is None else "norm:rms_of_groups"
        case _, Rope(pairs=pairs):
            return f"rope:{pairs}"
        case _, Gate(act="xielu"):
            return "xielu"
        case _, Gate(act=act, b=b):
            return f"activated:{act}" if b is None else f"gated:{act}"
        case _, Route(score=score):
            return f"route:{score}"
        case "part", _:
            return "concat"
    return micro.what


def micro_arguments(section: PlanSection, micro: Micro, own: bool) -> int:
    """The address of a micro-op's arguments; its output is at its new place from here on."""
    match micro.op:
        case Attention():
            return attention_micro(section, micro, micro.op, own)
        case Route():
            return route_micro(section, micro, micro.op, own)
        case Experts():
            return experts_micro(section, micro, micro.op, own)
    if micro.what == "embed":
        return _embed(section, micro, own)
    source, columns = section.places[micro.reads[0]], section.columns[micro.reads[0]]
    if micro.what == "pack":
        activation, private = section.pack(micro.reads[0], own=own, rounded=micro.op is not None)
        return section.struct(PACK, activation=activation, private=private, rows=1)
    match micro.op:
        case Gate(act="xielu"):
            return _xielu(section, micro.op, own)
        case Gate():
            return _gate(section, micro.op, own)
        case Concat():
            return _concat(section, micro.op, own)
        case Linear():
            return _part(section, micro, micro.op, own)
    second = section.places[micro.reads[1]] if len(micro.reads) > 1 else None
    out = section.write(micro.writes[0], columns, own=own)
    match micro.op:
        case Norm():
            return _norm(section, micro.op, source, out, columns)
        case Rope():
            return _rope(section, micro, micro.op, source, out)
        case Add():
            return section.struct(PAIR, a=source, b=second, out=out, columns=columns, scale=micro.op.scale)
        case Scale():
            factors = section.vector(micro.op.weight)
            return section.struct(
                SCALE, source=source, out=out, columns=columns, factors=factors, scale=micro.op.factor
            )
        case Clip():
            return section.struct(PAIR, a=source, out=out, columns=columns, limit=micro.op.limit)
        case Hadamard(block=block):
            numbers = {"columns": columns, "block": block, "scale": block**-0.5}
            return section.struct(HADAMARD, source=source, out=out, **numbers)
    if micro.what == "take":
        rows = section.ground.arrays.wanted.ctypes.data
        return section.struct(TAKE, source=source, out=out, rows=rows, columns=columns)
    return section.struct(SCALE, source=source, out=out, columns=columns, scale=micro.scale)


def _embed(section: PlanSection, micro: Micro, own: bool) -> int:
    op, ids = micro.op, section.ground.arrays.ids.ctypes.data
    if not isinstance(op, Embed):
        raise TypeError(micro.what)
    out = section.write(op.dst, op.cols, own=own)
    return section.struct(EMBED, matrix=section.matrix(op.table), ids=ids, out=out, columns=op.cols, scale=op.scale)


def _norm(section: PlanSection, op: Norm, source: Place, out: Place, columns: int) -> int:
    size = op.group or columns
    weight = section.vector(op.weight, op.offset)
    if op.weight is None:
        ones = np.pad(np.ones(size, np.float32), (0, padded(size, BLOCK) - size))
        weight = section.ground.memory.hold(ones)
    return section.struct(
        NORM,
        source=source,
        out=out,
        weight=weight,
        bias=section.vector(op.bias),
        columns=size,
        groups=columns // size,
        step=size * 4 if op.by_group else 0,
        epsilon=op.epsilon,
    )


def _rope(section: PlanSection, micro: Micro, op: Rope, source: Place, out: Place) -> int:
    ground = section.ground
    return section.struct(
        ROPE,
        source=source,
        out=out,
        sequences=ground.arrays.sequences.ctypes.data,
        positions=ground.arrays.positions.ctypes.data,
        table=len(ground.layout.groups) + op.table,
        turned=len(ground.program.ropes[op.table].frequencies),
        head_dim=op.head_dim,
        heads=section.columns[op.dst] // op.head_dim,
        scale=micro.scale,
    )


def _concat(section: PlanSection, op: Concat, own: bool) -> int:
    a, b = section.columns[op.a], section.columns[op.b]
    return section.struct(
        CONCAT,
        a=section.places[op.a],
        b=section.places[op.b],
        out=section.write(op.dst, a + b, own=own),
        heads=op.heads,
        a_columns=a // op.heads,
        b_columns=b // op.heads,
    )


def _part(section: PlanSection, micro: Micro, op: Linear, own: bool) -> int:
    """One part of a product's source, as the concatenation of itself with nothing."""
    (part,) = micro.writes
    columns = section.columns[op.src] // (op.parts or 1)
    number = part.number if isinstance(part, Inside) else 0
    source = section.places[op.src].later(number * columns)
    return section.struct(
        CONCAT, a=source, b=source, out=section.write(part, columns, own=own), heads=1, a_columns=columns
    )


def _xielu(section: PlanSection, op: Gate, own: bool) -> int:
    """Its numbers are those of the model, so they are computed here, once."""
    names = op.tensor_names()
    alpha_p, alpha_n, beta, eps = (float(section.decoded(name)[0]) for name in names)
    columns = section.columns[op.a]
    return section.struct(
        XIELU,
        source=section.places[op.a],
        out=section.write(op.dst, columns, own=own),
        columns=columns,
        limit=op.limit or inf,
        positive=np.logaddexp(0.0, alpha_p),
        negative=beta + np.logaddexp(0.0, alpha_n),
        beta=beta,
        eps=eps,
    )


def _gate(section: PlanSection, op: Gate, own: bool) -> int:
    numbers = {"limit": op.limit or inf, "alpha": op.alpha, "shift": op.shift}
    a, columns = section.places[op.a], section.columns[op.a]
    if op.b is None:
        return section.struct(PAIR, a=a, out=section.write(op.dst, columns, own=own), columns=columns, **numbers)
    b, others = section.places[op.b], section.columns[op.b]
    if op.by_layer:
        b, others = b.later((section.layer or 0) * columns), columns
    most = max(columns, others)
    single = {"a_single": columns < most, "b_single": others < most}
    out = section.write(op.dst, most, own=own)
    return section.struct(PAIR, a=a, b=b, out=out, columns=most, **single, **numbers)
