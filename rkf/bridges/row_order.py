"""Where the rows of a checkpoint's tensor are in the matrices of an .rkf file. Knows layouts, no file.

Found by laying out tensors of two columns whose values say where they are from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rkf.converters.families.layout import Assembly, whole_shape
from rkf.converters.families.layout_transforms import Shape, Transposed, Values


def row_order(assembly: Assembly, shapes: Mapping[str, Shape]) -> NDArray[np.int64] | None:
    """Which row of the parts, one below the other, is each row of a checkpoint's tensor; None unless only rows move."""
    origins = [part.origin for part in assembly.parts]
    if len(assembly.shape) != 2 or any(len(each.part) > 1 or each.stacked or each.joined for each in origins):
        return None
    codes: dict[str, Values] = {}
    start = 0
    for part in assembly.parts:
        rows = shapes[part.tensor][0]
        codes[part.tensor] = 2 * np.arange(start, start + rows)[:, None] + np.arange(2)
        start += rows
    try:
        found = replace(assembly, shape=(assembly.shape[0], 2)).values(codes.__getitem__)
    except (ValueError, IndexError):  # a transform that needs all columns, or changes the shape
        return None
    order = found[:, 0].astype(np.int64) // 2
    return order if (found == 2 * order[:, None] + np.arange(2)).all() else None


def stacked_rows(sources: Sequence[Assembly], shapes: Mapping[str, Shape]) -> tuple[NDArray[np.int64], bool] | None:
    """The same of each expert's matrix, and whether it is stored transposed.

    sources: one tensor with the matrices of all experts, or the tensors of single experts, first all of one kind, then
    all of the next, whose rows follow each other. shapes: of the file's stacks, [experts, rows, columns], in the order
    in which their rows are counted.
    """
    codes: dict[str, Values] = {}
    start = 0
    for tensor, (_, rows, _) in shapes.items():
        codes[tensor] = (2 * np.arange(start, start + rows)[:, None] + np.arange(2))[None]
        start += rows
    firsts = [each for each in sources if all(part.number == 0 for part in each.parts)]
    try:
        found = np.concatenate([_narrow(each, shapes).values(codes.__getitem__) for each in firsts])
    except (ValueError, IndexError):
        return None
    matrix = found[0] if found.ndim == 3 else found
    transposed = matrix.shape[0] == 2 and matrix.shape[1] == start
    matrix = matrix.T if transposed else matrix
    order = matrix[:, 0].astype(np.int64) // 2
    right = matrix.shape == (start, 2) and (matrix == 2 * order[:, None] + np.arange(2)).all()
    return (order, transposed) if right else None


def _narrow(assembly: Assembly, shapes: Mapping[str, Shape]) -> Assembly:
    """The assembly of one expert and two columns."""
    parts, pieces = [], []
    for part in assembly.parts:
        axes = list(part.origin.part)
        if axes and not part.origin.stacked:
            axes[0] = slice(0, 1)  # one expert
        turned = any(isinstance(step, Transposed) for step in part.origin.steps)
        columns = (0 if turned else 1) + (not part.origin.stacked)
        if len(axes) > columns:
            axes[columns] = slice(0, 2)
        origin = replace(part.origin, names=part.origin.names[:1], part=tuple(axes))
        parts.append(replace(part, origin=origin))
        pieces.append(((1, shapes[part.tensor][1], 2), origin))
    return replace(assembly, shape=whole_shape(pieces), parts=tuple(parts))
