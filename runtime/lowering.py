"""Phases to the structs that kernels read: the kernel of each phase, and its split into jobs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import inf
from typing import Any

import numpy as np

from rkf.model.ops import Attention, Conv, Experts
from rkf.model.recurrent_ops import Recurrent
from rkf.runtime.items import Product, Work
from rkf.runtime.lower_attention import attention_work
from rkf.runtime.lower_experts import experts_work
from rkf.runtime.lower_micros import micro_arguments, micro_kernel
from rkf.runtime.lower_recurrent import recurrent_work
from rkf.runtime.phases import Phase, ProductPhase, TokenPhase
from rkf.runtime.section import PlanSection
from rkf.runtime.structs import COUNTED, JOB, MICRO, PARTS, PRODUCT, TOKENS

_PRODUCT_PARTS = {"linear": "products", "linear:added": "added products", "logits": "logits"}
_TOKEN_PARTS = (("embed", "embedding"), ("keep", "cache"), ("join", "attention"), ("mix", "experts"))


def kernels_of(phase: Phase, cache_format: str) -> set[str]:
    """The names of the kernels that a phase needs."""
    if isinstance(phase, TokenPhase):
        return {"tokens", *(micro_kernel(micro, cache_format) for micro in phase.micros)}
    return {phase.kind if isinstance(phase, ProductPhase) else _work_kernel(phase, cache_format)}


def lowered(section: PlanSection, phases: Iterable[Phase]) -> list[tuple[int, ...]]:
    """A PHASE for each phase of a section."""
    found = []
    for phase in phases:
        if isinstance(phase, TokenPhase):
            found.append(_token_phase(section, phase))
        elif isinstance(phase, ProductPhase):
            found.append(_product_phase(section, phase))
        else:
            found.append(_work_phase(section, phase))
    return found


def _token_phase(section: PlanSection, phase: TokenPhase) -> tuple[int, ...]:
    ground = section.ground
    micros = []
    for micro in phase.micros:
        work = ground.addresses[micro_kernel(micro, ground.cache_format)]
        micros.append((work, micro_arguments(section, micro, phase.own)))
    work, arguments = micros[0]
    if len(micros) > 1:
        work = ground.addresses["tokens"]
        arguments = section.struct(TOKENS, micros=ground.memory.hold(np.array(micros, MICRO)), count=len(micros))
    whats = {micro.what for micro in phase.micros}
    part = next((part for what, part in _TOKEN_PARTS if what in whats), "vectors")
    return work, arguments, COUNTED.index("tokens"), 1, 0, int(phase.own), PARTS.index(part)


def _product_phase(section: PlanSection, phase: ProductPhase) -> tuple[int, ...]:
    """The jobs of the phase's products, split by rows."""
    step = section.ground.job_rows(sum(product.rows for product in phase.products))
    shares = [share for product in phase.products for share in _shares(section, product)]
    jobs = [(at, low, min(low + step, last)) for at, first, last in shares for low in range(first, last, step)]
    arguments = section.ground.memory.hold(np.array(jobs, JOB))
    part = PARTS.index(_PRODUCT_PARTS.get(phase.kind, "gated products"))
    return section.ground.addresses[phase.kind], arguments, COUNTED.index("once"), len(jobs), 0, 0, part


def _shares(section: PlanSection, product: Product) -> Iterator[tuple[int, int, int]]:
    """A PRODUCT for each source, with the first of its rows and the first after them."""
    fields, rows = _product(section, product), product.rows // len(product.sources)
    for number, source in enumerate(product.sources):
        address, private = section.activation(source)
        at = section.struct(PRODUCT, **fields, input=address, input_private=private)
        yield at, number * rows, (number + 1) * rows


def _product(section: PlanSection, product: Product) -> dict[str, Any]:
    """The fields of a PRODUCT, of one matrix or of two with a gate, except for its input."""
    fields: dict[str, Any] = {
        "matrix": section.matrix(product.weight, product.bias),
        "top": section.top,
        "scale": 1.0,
    }
    if product.logits is not None:
        op = product.logits
        return fields | {"scale": op.scale, "softcap": op.softcap or 0.0}
    if product.added is not None:
        return fields | {"out": section.places[product.added.a], "scale": product.added.scale}
    if product.partner is not None and product.gate is not None:
        partner, gate = product.partner, product.gate
        fields["partner"] = section.matrix(partner.weight, partner.bias)
        fields |= {"limit": gate.limit or inf, "alpha": gate.alpha, "shift": gate.shift}
        return fields | {"out": section.write(gate.dst, product.rows)}
    return fields | {"out": section.write(product.dst, product.rows)}


def _work_phase(section: PlanSection, work: Work) -> tuple[int, ...]:
    kernel = section.ground.addresses[_work_kernel(work, section.ground.cache_format)]
    if isinstance(work.op, Attention):
        return attention_work(section, work, work.op, kernel)
    if isinstance(work.op, Experts):
        return experts_work(section, work, work.op, kernel)
    if isinstance(work.op, Recurrent):
        return recurrent_work(section, work, work.op, kernel)
    raise TypeError(work.what)


def _work_kernel(work: Work, cache_format: str) -> str:
    op = work.op
    if isinstance(op, Attention):
        return f"{work.what}:{cache_format}" + (":capped" if op.softcap is not None else "")
    if isinstance(op, Experts) and work.what.endswith(":gate"):
        return f"{work.what}:{op.act}"
    if isinstance(op, Conv):
        return f"conv:{op.act}"
    return "pack" if work.what == "pack_slots" else work.what
