"""Rotation: a program whose matrices read their inputs through Hadamard transforms, and which matrices those are.

Whatever outliers a row has, its weights are all but Gaussian once they are transformed. A list of centroids and a
factor a row then reach the error that is optimal for Gaussians, without exact weights. A transformed matrix behind a
transform computes what the plain one computes, so the rotated program is the same model. Knows no family and no
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import cast

from rkf.model.op import Op, Width
from rkf.model.ops import Embed, Experts, Hadamard, Linear, Logits
from rkf.model.program import Program, layer_prefix
from rkf.model.roles import KEPT_DENSE, roles

LEAST_BLOCK = 16  # smaller blocks mix too few weights to be worth a transform


def rotated(program: Program, aliases: Mapping[str, str]) -> Program:
    """The program with a transform before every matrix that is worth clustering, and one behind a table that is also
    the output head. aliases: second names of tensors.

    The weights of the result's `rotations` are to be transformed too.
    """
    role_of = roles(program)
    lasting = {op.dst for op in program.stem}

    def transformed(ops: Sequence[Op], before: Mapping[str, Width], prefix: str = "") -> tuple[Op, ...]:
        def reads(op: Op) -> str | None:
            name = matrix_of(op)
            return None if name is None or role_of[prefix + name] in KEPT_DENSE else cast(Linear, op).src

        return _with_transforms(ops, before, lasting, reads)

    widths = _widths(program.stem)
    kinds = (
        transformed(kind, widths, layer_prefix(program.order.index(number)))
        for number, kind in enumerate(program.kinds)
    )
    top = transformed(program.top, widths)
    stem = transformed(program.stem, {})
    head = cast(Logits, top[-1])
    block = _in_list(top).get(head.weight)
    if block is not None:
        stem = _behind_table(stem, aliases.get(head.weight, head.weight), block, aliases)
    found = replace(program, stem=stem, kinds=tuple(kinds), top=top)
    found.check()
    return found


def unrotated(program: Program) -> Program:
    """The program without its transforms: that of the plain weights."""
    kinds = tuple(_without_transforms(kind) for kind in program.kinds)
    return replace(program, stem=_without_transforms(program.stem), kinds=kinds, top=_without_transforms(program.top))


def rotations(program: Program) -> dict[str, int]:
    """The matrices, stacks and tables whose rows are transformed, by full name, with the sizes of their blocks."""
    found = _in_list(program.stem)
    by_kind = [_in_list(kind) for kind in program.kinds]
    for number, kind in enumerate(program.order):
        found |= {layer_prefix(number) + name: block for name, block in by_kind[kind].items()}
    return found | _in_list(program.top)


def matrix_of(op: Op) -> str | None:
    """The matrix that an op multiplies its whole `src` with; of two stacks, the first."""
    if isinstance(op, Experts):
        return op.gate
    whole = isinstance(op, Logits) or (isinstance(op, Linear) and op.parts is None)
    return cast(Linear, op).weight if whole else None


def _widths(ops: Sequence[Op]) -> dict[str, Width]:
    widths: dict[str, Width] = {}
    for op in ops:
        widths[op.dst] = op.width(widths)
    return widths


def _with_transforms(
    ops: Sequence[Op], before: Mapping[str, Width], lasting: Collection[str], reads: Callable[[Op], str | None]
) -> tuple[Op, ...]:
    """The ops with a transform before the first matrix that reads a value. before: types of the values at the start;
    reads: the value that an op's matrix is worth transforming for.

    A value of the list that only such matrices read is transformed in place.
    """
    widths = dict(before)
    out: list[Op] = []
    transformed: dict[str, str] = {}  # value -> its transform
    for at, op in enumerate(ops):
        source, written = reads(op), op.width(widths)
        width = widths[source] if source is not None else None
        if source is not None and isinstance(width, int) and (block := width & -width) >= LEAST_BLOCK:
            if source not in transformed:
                alone = source not in lasting and all(reads(op) == source for op in _readers(ops[at:], source))
                transformed[source] = source if alone else f"{source}_rotated"
                out.append(Hadamard(src=source, dst=transformed[source], block=block))
            op = replace(cast(Linear, op), src=transformed[source])
        out.append(op)
        widths[op.dst] = written
        transformed.pop(op.dst, None)
    return tuple(out)


def _without_transforms(ops: Sequence[Op]) -> tuple[Op, ...]:
    out: list[Op] = []
    plain: dict[str, str] = {}  # transformed value -> the plain one
    for op in ops:
        if isinstance(op, Hadamard):
            plain[op.dst] = op.src
        elif matrix_of(op) is not None:
            out.append(replace(cast(Linear, op), src=plain.get(cast(Linear, op).src, cast(Linear, op).src)))
        else:
            out.append(op)
    return tuple(out)


def _readers(ops: Sequence[Op], value: str) -> list[Op]:
    """The ops that read a value before it is overwritten."""
    found = []
    for op in ops:
        if value in op.reads():
            found.append(op)
        if op.dst == value:
            break
    return found


def _behind_table(stem: Sequence[Op], table: str, block: int, aliases: Mapping[str, str]) -> tuple[Op, ...]:
    out: list[Op] = []
    for op in stem:
        out.append(op)
        if isinstance(op, Embed) and aliases.get(op.table, op.table) == table:
            out.append(Hadamard(src=op.dst, dst=op.dst, block=block))
    return tuple(out)


def _in_list(ops: Sequence[Op]) -> dict[str, int]:
    """Matrices that read a transformed value, and tables whose rows are transformed at once, by the ops' names."""
    found: dict[str, int] = {}
    blocks: dict[str, int] = {}  # transformed value -> block
    tables: dict[str, str] = {}  # value -> the table that it is a row of
    for op in ops:
        matrix = matrix_of(op)
        if matrix is not None and (block := blocks.get(cast(Linear, op).src)) is not None:
            names = (op.gate, op.up) if isinstance(op, Experts) else (matrix,)
            found |= dict.fromkeys(names, block)
        if isinstance(op, Hadamard) and op.src in tables:
            found[tables[op.src]] = op.block
        blocks.pop(op.dst, None)
        tables.pop(op.dst, None)
        if isinstance(op, Hadamard):
            blocks[op.dst] = op.block
        elif isinstance(op, Embed):
            tables[op.dst] = op.table
    return found
