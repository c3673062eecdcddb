"""Which matrix gets how many centroids within a budget: least loss by measured losses. Knows no file.

Losses of single matrices add (1.15 times the sum was lost by all together), and a doubling of K divides one by 3.6
(4.4, 3.5 and 3.9 of three kinds). They fall geometrically, so taking the best doubling for its bytes again and again is
optimal. Matrices of one kind differ a hundredfold: those that massive activations come from, the first layers' and the
last's, which none after them smooths (`docs/log.md`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from math import ceil, prod

import numpy as np
from numpy.typing import NDArray

from rkf.cluster.clustering import cluster
from rkf.cluster.compensate import DAMPING, Objective
from rkf.cluster.recipe import Recipe, Rule
from rkf.format.matrix import F32, DenseTensor

# What a matrix of a kind cost a 135M model of 30 layers, in 1e-4 nats as MEASURED, on text of its own, between the
# layers' median and mean: for conversions without data. Values and keys are few, and serve many queries.
_LOSS = {
    "q_proj": 4,
    "k_proj": 4,
    "v_proj": 10,
    "o_proj": 3,
    "gate_proj": 5,
    "up_proj": 6,
    "down_proj": 9,
}
_ENDS = 4  # times that in the first and the last layer
_HEAD_LOSS = 200  # of the output head, tied or not; an embedding that is no head costs no more than a layer's matrix
_EMBEDDING_LOSS = 10
_PER_DOUBLING = 3.6
_TABLE_BYTES = 12  # of a centroid and its count
LEAST_BITS, MOST_BITS = 2.0, 6.5  # of entropy, in an archive
_REACH = 1.2  # bits of a rank above its entropy, at least: only what lies past 4.7 deviations may be clipped
_HALVINGS = 50
KS = (8, 16, 32, 64, 128, 255)
MEASURED = Rule(k=32, grid=True, affine="tensor", exceptions=0.001)
# exact_rows: of the tokens that a text has most of, a third of it. What the embedding costs is measured without them:
# with them it got K = 32 in 91 MB, and the mean divergence rose by 8 %, for the rare tokens' sake.
_HEADER = """description = "K chosen for a budget."

[defaults]
grid = true
affine = "tensor"
exceptions = 0.001
exact_rows = 64
"""


def coarse(weights: F32, moments: NDArray[np.floating] | None) -> F32:
    """Weights stored as losses are measured, suited to the second moments of their inputs where those are known."""
    objective = None if moments is None else Objective.of(moments, DAMPING)
    return cluster(DenseTensor("f32", weights), MEASURED, "", objective)[0].decode()


def doublings(shapes: Mapping[str, tuple[int, ...]], losses: Mapping[str, float]) -> list[tuple[str, int]]:
    """(matrix, bytes) for every step of every matrix along KS, the step that gains most for its bytes first.

    shapes: of the matrices to be clustered; losses: what each costs at one K, whichever.
    """
    sizes = {name: prod(shape) // 8 for name, shape in shapes.items()}  # a bit a weight
    waiting = [(-losses[name] / sizes[name], name, 0) for name in shapes]
    heapq.heapify(waiting)
    order = []
    while waiting:
        gain, name, step = heapq.heappop(waiting)
        order.append((name, sizes[name] + _TABLE_BYTES * (KS[step + 1] - KS[step])))
        if step + 2 < len(KS):
            heapq.heappush(waiting, (gain / _PER_DOUBLING, name, step + 1))
    return order


def within(steps: Iterable[tuple[str, int]], available: int) -> list[str]:
    """The matrices of the steps that fit, the first ones first; what follows a step that does not fit is left out."""
    chosen, closed = [], set()
    for name, size in steps:
        if name not in closed and size <= available:
            chosen.append(name)
            available -= size
        else:
            closed.add(name)
    return chosen


def recipe(names: Sequence[str], steps: Sequence[str]) -> Recipe:
    """A recipe that gives each matrix the least of KS, moved along by one for each time it is among `steps`."""
    at = dict.fromkeys(names, 0)
    for name in steps:
        at[name] += 1
    rules = []
    for step, k in enumerate(KS):
        chosen = ",\n".join(f'  "{name}"' for name in sorted(names) if at[name] == step)
        if chosen:
            rules.append(f"\n[[rule]]\nk = {k}\ntensors = [\n{chosen},\n]\n")
    return Recipe.parse(_HEADER + "".join(rules), "budget")


def archive(shapes: Mapping[str, tuple[int, ...]], losses: Mapping[str, float], bits: float) -> Recipe:
    """A recipe for files that are stored packed: even steps whose ranks have an entropy of `bits` on average, finer
    where a weight costs more. K is what the steps need.
    """
    weights = np.array([prod(shape) for shape in shapes.values()], np.float64)
    wanted = np.log([losses[name] for name in shapes] / weights) / np.log(4)  # a bit more quarters the squared error
    low, high = bits - wanted.max(), bits - wanted.min() + MOST_BITS
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        given = np.clip(wanted + middle, LEAST_BITS, MOST_BITS)
        low, high = (low, middle) if (given * weights).sum() > bits * weights.sum() else (middle, high)
    rules = [
        f'\n[[rule]]\nbits = {each:.2f}\nk = {min(1 << ceil(each + _REACH), 255)}\ntensors = ["{name}"]\n'
        for name, each in zip(shapes, np.clip(wanted + low, LEAST_BITS, MOST_BITS), strict=True)
    ]
    return Recipe.parse(_HEADER + "".join(rules), "archive")


def expected_losses(names: Iterable[str], layers: int, tied: bool) -> dict[str, float]:
    """The losses of the matrices of a model that nothing was measured on. tied: the embedding is the head."""
    return {name: _expected(name.split("."), layers, tied) for name in names}


def _expected(parts: Sequence[str], layers: int, tied: bool) -> float:
    if parts[:2] != ["model", "layers"]:
        return _HEAD_LOSS if tied or parts[0] == "lm_head" else _EMBEDDING_LOSS
    return _LOSS[parts[-2]] * (_ENDS if int(parts[2]) in (0, layers - 1) else 1)
