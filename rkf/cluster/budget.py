"""Which matrix gets how many centroids within a budget: least loss by measured sensitivities. Knows no file.

Clustering matrices one kind and a third of the layers at a time gave the divergences below (135M model of 30 layers,
K = 16, error-compensated, a matrix in 1e-4 nats); together they lost 1.15 times the sum. A doubling of K divides a loss
by 3.6. Losses add and fall geometrically, so taking the best doubling for its bytes again and again is optimal.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from math import prod

from rkf.cluster.recipe import Recipe

# Kind of matrix -> loss in the first, middle and last third of the layers. Values and keys are few, and serve many
# queries.
_LOSS = {
    "v_proj": (12.3, 22.7, 10.3),
    "k_proj": (3.6, 12.3, 8.3),
    "q_proj": (2.7, 3.8, 3.2),
    "o_proj": (3.6, 3.1, 2.6),
    "gate_proj": (8.0, 6.4, 8.7),
    "up_proj": (9.4, 8.4, 16.5),
    "down_proj": (10.4, 8.4, 24.2),
}
_HEAD_LOSS = 1200.0  # of the output head, tied or not; an embedding that is no head costs no more than a layer
_EMBEDDING_LOSS = 30.0
_LAYERS = 30
_PER_DOUBLING = 3.6
_TABLE_BYTES = 12  # of a centroid and its count
KS = (8, 16, 32, 64, 128, 255)
_HEADER = """description = "K chosen for a budget."

[defaults]
grid = true
affine = "tensor"
exceptions = 0.001
"""


def doublings(shapes: Mapping[str, tuple[int, ...]], layers: int, tied: bool) -> list[tuple[str, int]]:
    """(matrix, bytes) for every step of every matrix along KS, the step that gains most for its bytes first.

    shapes: of the matrices to be clustered; tied: whether the embedding is the output head too.
    """
    sizes = {name: prod(shape) // 8 for name, shape in shapes.items()}  # a bit a weight
    waiting = [(-_gain(name, 0, layers, tied) / sizes[name], name, 0) for name in shapes]
    heapq.heapify(waiting)
    order = []
    while waiting:
        _, name, step = heapq.heappop(waiting)
        order.append((name, sizes[name] + _TABLE_BYTES * (KS[step + 1] - KS[step])))
        if step + 2 < len(KS):
            heapq.heappush(waiting, (-_gain(name, step + 1, layers, tied) / sizes[name], name, step + 1))
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


def _gain(name: str, step: int, layers: int, tied: bool) -> float:
    """Loss that a matrix is spared by moving from KS[step] to the next."""
    return _loss(name, layers, tied) * (_PER_DOUBLING**-step - _PER_DOUBLING ** -(step + 1))


def _loss(name: str, layers: int, tied: bool) -> float:
    parts = name.split(".")
    if parts[:2] != ["model", "layers"]:
        return _HEAD_LOSS if tied or name.startswith("lm_head") else _EMBEDDING_LOSS
    return _LOSS[parts[-2]][3 * int(parts[2]) // layers] * _LAYERS / layers
