"""A program with a low-rank adapter: y = W x becomes y = W x + scale * B (A x). Knows no family and no weights.

The added ops are those that every runtime has, so an adapter needs no kernel, and a program without one is unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from rkf.model.op import Op
from rkf.model.ops import Add, Linear
from rkf.model.program import Program, layer_prefix


class LowRank(NamedTuple):
    """The product added to a matrix: its rank, and its factor. A: f32[rank, cols], B: f32[rows, rank]."""

    rank: int
    scale: float


def half_names(weight: str) -> tuple[str, str]:
    """The names of A and B, from that of their matrix."""
    module = weight.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def plain_matrices(program: Program) -> frozenset[str]:
    """The matrices that `adapted` can change, by full name: those of a Linear that is not in parts."""
    found = _plain(program.stem) | _plain(program.top)
    for number in range(program.layers):
        found |= {layer_prefix(number) + name for name in _plain(program.layer(number))}
    return frozenset(found)


def adapted(program: Program, products: Mapping[str, LowRank]) -> Program:
    """The program with these products, by the full names of their matrices. Layers whose products differ become kinds
    of their own.
    """
    kinds: dict[tuple[Op, ...], int] = {}
    order = []
    for number in range(program.layers):
        changed = _with_products(program.layer(number), products, layer_prefix(number))
        order.append(kinds.setdefault(changed, len(kinds)))
    stem, top = (_with_products(ops, products, "") for ops in (program.stem, program.top))
    found = replace(program, stem=stem, kinds=tuple(kinds), order=tuple(order), top=top)
    found.check()
    return found


def _plain(ops: Sequence[Op]) -> set[str]:
    return {op.weight for op in ops if isinstance(op, Linear) and op.parts is None}


def _with_products(ops: Sequence[Op], products: Mapping[str, LowRank], prefix: str) -> tuple[Op, ...]:
    out: list[Op] = []
    for op in ops:
        product = products.get(prefix + op.weight) if isinstance(op, Linear) else None
        if product is None or not isinstance(op, Linear):
            out.append(op)
            continue
        (a, b), inner, outer = half_names(op.weight), f"{op.dst}_lora_a", f"{op.dst}_lora_b"
        out.append(Linear(src=op.src, dst=inner, weight=a, rows=product.rank))  # first: the matrix may overwrite src
        out.append(op)
        out.append(Linear(src=inner, dst=outer, weight=b, rows=op.rows))
        out.append(Add(a=op.dst, b=outer, dst=op.dst, scale=product.scale))
    return tuple(out)
