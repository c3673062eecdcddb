"""Measures how much a model's predictions lose when one matrix alone is stored coarsely, on a few tokens.

Perturbed copies of the residual stream pass through the layers beside the true one, so weights are read once. Copies of
some matrices pass to the end. The losses of the others follow from how much they disturb the stream behind their layer.
Only the difference between a copy and the true stream is multiplied in eight bits, so the error is small beside it.
Knows no clustering: a callable makes the coarse matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from rkf.calibrate import divergences
from rkf.calibrate.divergences import Coarse, Measured
from rkf.calibrate.interpreter import Flow, Stretch, Weights
from rkf.calibrate.known import Known, known_matrices
from rkf.calibrate.moments import Moments, tapped
from rkf.calibrate.passes import F32, U32, TensorReader, rounded, stretches
from rkf.format.codec import workers
from rkf.model.program import Program
from rkf.worker_threads import WorkerThreads


def losses(program: Program, reader: TensorReader, coarse: Coarse, tokens: U32) -> dict[str, float]:
    """The loss of each matrix by its stored name (`rkf.calibrate.divergences.losses`).

    tokens: u32[sequences, ctx]. Memory holds one layer's weights, the head, and copies of several hundred states for
    each matrix that is followed.
    """
    followed, head = divergences.followed(program), program.logits.weight
    batches, measured = divergences.pieces(tokens)
    seen, true = [Flow(ids) for ids in batches], Flow(measured)
    names: list[str] = []
    copies: list[Flow] = []
    nearby: dict[str, float] = {}
    with threadpool_limits(1, "blas"), WorkerThreads(workers()) as pool:
        for stretch, weights in _read_ahead(pool, reader, stretches(program, divergences.PIECE)):
            multiplied = sorted(stretch.multiplied & weights.keys())
            packed = dict(zip(multiplied, pool.map(rounded, (weights[name] for name in multiplied)), strict=True))
            known: dict[str, Any] = {**weights, **known_matrices(stretch, weights, packed)}
            passing = pool.submit(stretch, known, true)
            seen, moments = tapped(pool, stretch, {**weights, **packed}, seen, followed | {head})
            of_head = moments.pop(head, None)
            after = passing.result()
            near = {name: each.near if isinstance(each, Known) else each for name, each in known.items()}
            disturb = partial(_disturbed, stretch, near, weights, coarse, true)
            every = sorted({*multiplied, *stretch.tables})
            chosen = [name for name in every if name in followed]
            fitted = pool.map(disturb, chosen, (moments.get(name) for name in chosen))  # first: they take longest
            nearest = pool.map(disturb, every, repeat(None))
            copies = [*pool.map(partial(stretch, near), copies), *fitted]
            names += chosen
            nearby |= {
                name: divergences.disturbance(after.values, flow.values)
                for name, flow in zip(every, nearest, strict=True)
            }
            true = after
        scored = [divergences.scored(flow.values[program.logits.src]) for flow in (true, *copies)]
    found = Measured(scored[0], dict(zip(names, scored[1:], strict=True)), nearby, of_head)
    return divergences.losses(program, reader, coarse, found)


def _read_ahead(
    pool: ThreadPoolExecutor, reader: TensorReader, stretches: Iterable[Stretch]
) -> Iterator[tuple[Stretch, dict[str, Any]]]:
    """Each stretch with its tensors, which are read while the one before is in use."""
    waiting: list[tuple[Stretch, Future[dict[str, Any]]]] = []
    for stretch in stretches:
        waiting.append((stretch, pool.submit(reader.indexed, stretch)))
        if len(waiting) > 1:
            before, weights = waiting.pop(0)
            yield before, weights.result()
    for stretch, weights in waiting:
        yield stretch, weights.result()


class _CoarseTable:
    """The rows of a coarse embedding for some tokens."""

    def __init__(self, ids: NDArray[np.integer], rows: F32) -> None:
        self._ids, self._rows = ids, rows

    def __getitem__(self, ids: NDArray[np.integer]) -> F32:
        """f32[ids' shape, cols]"""
        return self._rows[np.searchsorted(self._ids, ids)]


def _disturbed(
    stretch: Stretch,
    near: Weights,
    weights: Mapping[str, Any],
    coarse: Coarse,
    true: Flow,
    name: str,
    moments: Moments | None,
) -> Flow:
    """The flow after a stretch if this table or matrix alone is coarse. moments: to fit it to."""
    if name in stretch.tables:
        stored: Any = _CoarseTable(*divergences.coarse_rows(weights[name], true.ids, coarse, None))
    else:
        stored = coarse(weights[name], moments)
    return stretch({**near, name: stored}, true)
