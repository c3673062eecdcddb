"""The structs of a mixture of experts: the choice, slots, products, and the sum."""

from __future__ import annotations

from math import inf

from rkf.model.ops import Experts, Route
from rkf.runtime.buffers import TILE, padded
from rkf.runtime.items import GATHERED, INNER, OUTER, Inside, Micro, Work
from rkf.runtime.section import PlanSection
from rkf.runtime.structs import BLOCK, COUNTED, EXPERTS, MIX, PACK, PARTS, ROUTE, SLOTS

_EXPERTS_PART = PARTS.index("experts")


def route_micro(section: PlanSection, micro: Micro, op: Route, own: bool) -> int:
    """The arguments of the choice. Its value is a row of `count` expert numbers and weights (kernels/experts.py)."""
    source = section.places[micro.reads[0]]
    out = section.write(op.dst, 3 * op.count, own=own)
    return section.struct(
        ROUTE,
        source=source,
        out=out,
        select=section.vector(op.select),
        factors=section.vector(op.expert_scale),
        experts=op.experts,
        count=op.count,
        groups=op.groups or 0,
        top_groups=op.top_groups or 0,
        normalise=op.normalise,
        add=op.add,
        floor=op.floor,
        scale=op.scale,
    )


def experts_micro(section: PlanSection, micro: Micro, op: Experts, own: bool) -> int:
    """The arguments for packing the inner values of one token, or for the sum."""
    count = _count(section, op)
    if micro.what == "pack_chosen":
        activation, private = section.pack(INNER, own=own, rows=count)
        return section.struct(PACK, activation=activation, private=private, rows=count)
    y, route = section.places[OUTER], section.places[op.route]
    return section.struct(
        MIX,
        y=y,
        route=route,
        out=section.write(op.dst, op.rows, own=own),
        slots=_Slots(section, op).slots if len(micro.reads) > 2 else 0,
        bias=section.vector(op.down_bias),
        columns=op.rows,
        count=count,
        scale_input=op.scale_input,
    )


def experts_work(section: PlanSection, work: Work, op: Experts, kernel: int) -> tuple[int, ...]:
    """The PHASE of a part of a mixture."""
    counted, times = COUNTED.index("once"), 1
    match work.what:
        case "sort":
            arguments = _Slots(section, op).struct()
        case "gather":
            counted, arguments = COUNTED.index("tokens"), _Slots(section, op).gathered()
        case "pack_slots":
            counted, times = COUNTED.index("tokens"), _count(section, op)
            activation, private = section.pack(INNER, own=False, rows=times)
            arguments = section.struct(PACK, activation=activation, private=private, rows=1)
        case _:
            one, count = ":one:" in work.what, _count(section, op)
            arguments, chunks = _products(section, work, op, one)
            times = chunks * (count if one else _experts(section, op))
    return kernel, arguments, counted, times, 0, 0, _EXPERTS_PART


def _products(section: PlanSection, work: Work, op: Experts, one: bool) -> tuple[int, int]:
    """The EXPERTS of gate and up, or of down, and the number of items per expert."""
    count = _count(section, op)
    gate = work.what.endswith(":gate")
    rows = op.inner if gate else op.rows
    step = min(section.ground.job_rows(count * rows), padded(rows, 32))
    fields: dict[str, object] = {
        "route": section.places[op.route],
        "rows": rows,
        "step": step,
        "chunks": -(-rows // step),
        "count": count,
    }
    if not one:
        slots = _Slots(section, op)
        fields |= {"starts": slots.starts, "weights": slots.weights}
    if gate:
        fields["input"], fields["input_private"] = (
            section.activation(op.src) if one else section.activation(GATHERED, rows=count)
        )
        fields |= {
            "matrix": section.matrix(op.gate),
            "partner": section.matrix(op.up),
            "bias": section.vector(op.gate_bias),
            "partner_bias": section.vector(op.up_bias),
            "a": section.write(Inside("experts' gates"), rows, rows=count),
            "b": section.write(Inside("experts' ups"), rows, rows=count),
            "out": section.write(INNER, rows, rows=count),
            "scale_input": op.scale_input,
            "limit": op.limit or inf,
            "alpha": op.alpha,
            "shift": op.shift,
        }
    else:
        fields["input"], fields["input_private"] = section.activation(INNER, rows=count)
        fields |= {"matrix": section.matrix(op.down), "a": section.write(OUTER, rows, rows=count)}
    return section.struct(EXPERTS, **fields), -(-rows // step)


class _Slots:
    """Memory for the slots of several tokens. All mixtures of a shape share it, because only one runs at a time."""

    def __init__(self, section: PlanSection, op: Experts) -> None:
        self._section, self._op = section, op
        self._experts, self._count = _experts(section, op), _count(section, op)
        choices = TILE * self._count
        self.starts = self._words("starts", self._experts + 1)
        self.cursors = self._words("cursors", self._experts)
        self.slots = self._words("slots", choices)
        self.weights = self._words("weights", choices)

    def struct(self, **fields: int) -> int:
        return self._section.struct(
            SLOTS,
            route=self._section.places[self._op.route],
            starts=self.starts,
            cursors=self.cursors,
            slots=self.slots,
            weights=self.weights,
            experts=self._experts,
            count=self._count,
            **fields,
        )

    def gathered(self) -> int:
        """The SLOTS, including the activations of the tokens and of the slots."""
        section, columns = self._section, self._section.columns[self._op.src]
        packed_row = section.copies(GATHERED, self._op.src, self._count)
        source, _ = section.activation(self._op.src)
        target, _ = section.activation(GATHERED, rows=self._count)
        values_bytes = padded(columns, BLOCK) * 4
        return self.struct(source=source, gathered=target, packed_bytes=packed_row, values_bytes=values_bytes)

    def _words(self, name: str, count: int) -> int:
        return self._section.ground.buffers.words((name, self._experts, self._count), count)


def _count(section: PlanSection, op: Experts) -> int:
    """The number of experts that a token goes to."""
    return section.columns[op.route] // 3


def _experts(section: PlanSection, op: Experts) -> int:
    return section.ground.weights.rows(section.prefix + op.down) // op.rows
