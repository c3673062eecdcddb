"""Chooses the number of centroids of each matrix within a budget, for the least total of measured losses. Knows no
file.

Losses of single matrices add up (all together lost 1.15 times their sum). A loss follows the squared error: doubling K
divided it by 4.4, 3.5 and 3.9 for three kinds. Each doubling of a matrix gains less than the one before, so it is
optimal to take the doubling with the best gain per byte again and again. Matrices of one kind differ a hundredfold. The
most sensitive are those that cause massive activations, those of the first layers, and those of the last, whose errors
no later layer smooths (`docs/log.md`).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from math import ceil, prod

import numpy as np

from rkf.cluster.clustering import cluster
from rkf.cluster.compensate import Moments, objectives
from rkf.cluster.recipe import Recipe, Rule
from rkf.format.constants import index_bits
from rkf.format.matrix import F32, DenseTensor
from rkf.model.program import Program, layer_of
from rkf.model.roles import roles

# For conversions without measurement: the loss of a weight by role, relative to one of an up projection. Between those
# measured on a 135M model (plain) and on a 0.5B model (rotated): query 1.8 and .65, key 5.3 and 5.4, value 13 and 10,
# output 1.3 and 1.8, gate .8 and .6, down 1.5 and .7, head 1.1 and .9, embedding .05 and .24. Losses by matrix differ
# more, as models differ in the shapes of keys and values.
_LOSS = {
    "query": 1,
    "key": 5.4,
    "value": 11,
    "output": 1.6,
    "gate": 0.7,
    "up": 1,
    "down": 1,
    "expert_gate": 0.7,
    "expert_up": 1,
    "expert_down": 1,
    "head": 1,
    "embedding": 0.3,
    "other": 5,
}
_ENDS = 3  # factor for the first and the last layer
_LIST_BYTES = 12  # bytes of a centroid and its count
LEAST_BITS, MOST_BITS = 2.0, 6.5  # limits of the entropy in an archive
_REACH = 1.2  # minimum bits of a rank above its entropy: only values beyond 4.7 deviations may be clipped
_HALVINGS = 50
# K -> the squared error of a rotated matrix relative to its squares: that of a Gaussian on the grid, a factor a row.
# 255 points are the whole grid, so the last bit only halves the error. K = 4 is for embeddings that are not the output
# head: that of a 0.5B model, 17 MB a bit, loses .036 at K = 4, .008 at K = 8. Layers at K = 4 have not been measured.
_ERRORS = {4: 0.1172, 8: 0.0344, 16: 0.00943, 32: 0.00248, 64: 0.000644, 128: 0.000169, 255: 0.000085}
KS = tuple(_ERRORS)
# The K that a level of CPU multiplies fastest, where all others take up to twice the arithmetic for a byte: with AVX2
# 16 values are one lookup, and 255 on the grid none.
FASTEST = {"avx2": (16, 255)}
MEASURED = Rule(k=32, grid=True, affine="row", exceptions=0.001)
# exact_rows: the 64 most frequent tokens, which make up a third of the text. The loss of the output head is measured
# without them. With them it got K = 32 in 91 MB, and the mean divergence rose by 8 % because of rare tokens. In an
# embedding by itself they take 6 % of the loss at K = 8.
_HEADER = """description = "K chosen for a budget."

[defaults]
grid = true
affine = "tensor"
exceptions = 0.001
exact_rows = 64

[rotated]
affine = "row"
exceptions = 0
"""


def coarse(weights: F32, moments: Moments | None) -> F32:
    """Weights in the coarse form for measuring losses, fitted to the second moments of their inputs if known. Without
    descent, which takes six times as long as compensation and lowers all losses alike.
    """
    objective = None if moments is None else objectives(moments, passes=0)
    return cluster(DenseTensor("f32", weights), MEASURED, "", objective)[0].decode()


def ladders(
    names: Iterable[str], embeddings: Collection[str] = (), cpu: str | None = None
) -> dict[str, tuple[int, ...]]:
    """The K that each matrix may have, ascending. embeddings: those whose rows are only looked up, which takes no time
    and may lose more. cpu: one of FASTEST, or None for any.
    """
    usual = KS[1:] if cpu is None else FASTEST[cpu]
    return {name: KS if name in embeddings else usual for name in names}


def steps(
    shapes: Mapping[str, tuple[int, ...]], losses: Mapping[str, float], allowed: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, int]]:
    """(matrix, bytes) for every step of every matrix along its ladder, the step with the best gain per byte first.

    shapes: those of the matrices to cluster; losses: the loss of each at one K, the same for all; allowed: ladders.
    """

    def cost(name: str, k: int, more: int) -> int:
        shape = shapes[name]
        bits, lists = index_bits(more) - index_bits(k), prod(shape[:-2])
        return prod(shape) // 8 * bits + _LIST_BYTES * lists * (more - k)

    def waiting_for(name: str, step: int) -> tuple[float, str, int]:
        k, more = allowed[name][step : step + 2]
        bits = index_bits(more) - index_bits(k)
        return -(_ERRORS[k] - _ERRORS[more]) * losses[name] / (prod(shapes[name]) * bits), name, step

    waiting = [waiting_for(name, 0) for name in shapes if len(allowed[name]) > 1]
    heapq.heapify(waiting)
    order = []
    while waiting:
        _, name, step = heapq.heappop(waiting)
        order.append((name, cost(name, *allowed[name][step : step + 2])))
        if step + 2 < len(allowed[name]):
            heapq.heappush(waiting, waiting_for(name, step + 1))
    return order


def within(steps: Iterable[tuple[str, int]], available: int) -> list[str]:
    """The matrices of the steps that fit, in order; everything from the first step that does not fit is left out."""
    chosen, closed = [], set()
    for name, size in steps:
        if name not in closed and size <= available:
            chosen.append(name)
            available -= size
        else:
            closed.add(name)
    return chosen


def lone_embeddings(program: Program, head: str) -> set[str]:
    """The embeddings that are not the output head. head: the name under which that is stored."""
    return {name for name, role in roles(program).items() if role == "embedding" and name != head}


def recipe(program: Program, allowed: Mapping[str, tuple[int, ...]], chosen: Iterable[str]) -> Recipe:
    """A recipe that gives each matrix the first K of its ladder, then the next for each time it is among `chosen`."""
    taken = Counter(chosen)
    of_k: dict[int, list[str]] = {}
    for name in sorted(allowed):
        of_k.setdefault(allowed[name][taken[name]], []).append(name)
    rules = []
    for k, names in sorted(of_k.items()):
        tensors = ",\n".join(f'  "{name}"' for name in names)
        rules.append(f"\n[[rule]]\nk = {k}\ntensors = [\n{tensors},\n]\n")
    return Recipe.parse(_HEADER + "".join(rules), "budget", program)


def archive(
    program: Program, shapes: Mapping[str, tuple[int, ...]], losses: Mapping[str, float], bits: float
) -> Recipe:
    """A recipe for files that are stored packed: even steps whose ranks have an entropy of `bits` on average, finer
    where a weight has a larger loss. K is as large as the steps need.
    """
    weights = np.array([prod(shape) for shape in shapes.values()], np.float64)
    wanted = np.log([losses[name] for name in shapes] / weights) / np.log(4)  # one more bit quarters the squared error
    low, high = bits - wanted.max(), bits - wanted.min() + MOST_BITS
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        given = np.clip(wanted + middle, LEAST_BITS, MOST_BITS)
        low, high = (low, middle) if (given * weights).sum() > bits * weights.sum() else (middle, high)
    rules = [
        f'\n[[rule]]\nbits = {each:.2f}\nk = {min(1 << ceil(each + _REACH), 255)}\ntensors = ["{name}"]\n'
        for name, each in zip(shapes, np.clip(wanted + low, LEAST_BITS, MOST_BITS), strict=True)
    ]
    return Recipe.parse(_HEADER + "".join(rules), "archive", program)


def expected_losses(program: Program, shapes: Mapping[str, tuple[int, ...]], head: str) -> dict[str, float]:
    """Typical losses of a model's matrices, without measurement. head: the name under which the output head is stored;
    it is the embedding's if the head is tied.

    All experts of a stack together have the loss of one matrix, as a token reads few of them.
    """
    role_of, ends = {**roles(program), head: "head"}, {0, program.layers - 1}
    return {
        name: _LOSS[role_of[name]] * prod(shape[-2:]) * (_ENDS if layer_of(name) in ends else 1)
        for name, shape in shapes.items()
    }
