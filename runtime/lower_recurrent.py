"""The structs of ops with a state per sequence."""

from __future__ import annotations

from math import inf

import numpy as np

from rkf.model.ops import Conv, Delta, Scan
from rkf.model.recurrent_ops import Recurrent
from rkf.runtime.buffers import padded
from rkf.runtime.items import Work
from rkf.runtime.section import PlanSection
from rkf.runtime.structs import CONV, COUNTED, DELTA, LANES, PARTS, SCAN

_SEGMENTS, _PART = COUNTED.index("segments"), PARTS.index("states")


def recurrent_work(section: PlanSection, work: Work, op: Recurrent, kernel: int) -> tuple[int, ...]:
    """The PHASE of a recurrent op, with an item per segment and group of channels or head."""
    if isinstance(op, Conv):
        arguments, items = _conv(section, op)
    elif isinstance(op, Scan):
        arguments, items = _scan(section, op), op.heads
    else:
        arguments, items = _delta(section, op), op.value_heads
    return kernel, arguments, _SEGMENTS, items, 0, 0, _PART


def _conv(section: PlanSection, op: Conv) -> tuple[int, int]:
    source, columns = section.places[op.src], section.columns[op.src]
    step, width = section.ground.job_rows(columns), padded(columns, LANES)
    weight = section.ground.weights.decoded(section.prefix + op.weight)
    transposed = np.pad(np.ascontiguousarray(weight.T), ((0, 0), (0, width - columns)))
    arguments = section.struct(
        CONV,
        source=source,
        out=section.write(op.dst, columns),
        **_kept(section, op),
        weight=section.ground.memory.hold(transposed),
        bias=section.vector(op.bias),
        columns=columns,
        padded=width,
        taps=op.taps,
        step=step,
        chunks=-(-columns // step),
    )
    return arguments, -(-columns // step)


def _delta(section: PlanSection, op: Delta) -> int:
    places = {"source": section.places[op.src], "a": section.places[op.a], "b": section.places[op.b]}
    return section.struct(
        DELTA,
        **places,
        out=section.write(op.dst, op.value_heads * op.value_dim),
        **_kept(section, op),
        a_log=section.vector(op.a_log),
        dt_bias=section.vector(op.dt_bias),
        key_heads=op.key_heads,
        value_heads=op.value_heads,
        key_dim=op.key_dim,
        value_dim=op.value_dim,
        padded=padded(op.value_dim, LANES),
    )


def _scan(section: PlanSection, op: Scan) -> int:
    return section.struct(
        SCAN,
        source=section.places[op.src],
        dt=section.places[op.dt],
        out=section.write(op.dst, op.heads * op.head_dim),
        **_kept(section, op),
        a_log=section.vector(op.a_log),
        dt_bias=section.vector(op.dt_bias),
        d=section.vector(op.d),
        heads=op.heads,
        head_dim=op.head_dim,
        groups=op.groups,
        state_dim=op.state_dim,
        padded=padded(op.head_dim, LANES),
        dt_min=op.dt_min,
        dt_max=op.dt_max or inf,
    )


def _kept(section: PlanSection, op: Recurrent) -> dict[str, int]:
    """Where the state of an op is found."""
    ground, layout = section.ground, section.ground.layout
    return {
        "sequences": ground.arrays.sequences.ctypes.data,
        "segments": ground.arrays.segments.ctypes.data,
        "state_word": len(layout.groups) + len(ground.program.ropes),
        "state": layout.states[section.layer or 0, op.name],
    }
