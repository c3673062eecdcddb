"""Measures how much a model's predictions lose when one matrix alone is stored coarsely, on a few tokens.

Perturbed copies of the residual stream pass through the layers beside the true one, so weights are read once. Copies of
some matrices pass to the end. The losses of the others follow from how much they disturb the stream behind their layer.
Only the difference between a copy and the true stream is multiplied in eight bits, so the error is small beside it.
Knows no clustering: a callable makes the coarse matrices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import repeat
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from rkf.calibrate.interpreter import Flow, Stretch, Weights, logits
from rkf.calibrate.moments import Moments, tapped
from rkf.calibrate.passes import F32, U32, TensorReader, rounded, stretches
from rkf.format.codec import workers
from rkf.model.ops import Embed, Logits
from rkf.model.program import Program, layer_of, layer_prefix
from rkf.model.roles import clusterable
from rkf.numbers.eight_bits import Near, Panels

Coarse = Callable[[F32, "Moments | None"], F32]
"""Weights as a coarse file would store them. If the second moments of their inputs are given, fitted to those."""

_PIECE = 128  # tokens of a piece of text
_SEEN = 40  # pieces for the moments of the inputs
_MEASURED = 3  # other pieces, from which copies are made
_COPIED, _SCORED = 96, 48  # their last tokens: after little context the first layers seem more important than they are
_DRAWS = 16  # tokens drawn from each prediction
_ROWS = 4096  # rows of the embedding beyond the needed ones, so that its centroids match those of the whole
_TOGETHER = 4  # pieces that one thread processes together
# Of the matrices of one name, every sixth is followed to the end, and two at either end of the model. On a 135M model
# of 30 layers the other losses are then wrong by a factor of 1.2 (one deviation; the same with every third, 1.6 if the
# disturbance is left out). Choosing K by them costs 2.5 to 2.8 % more loss at equal size: disturbances are those of
# nearest centroids, a tenth of the time. Fitted to the moments of all layers it costs 0.7 to 1.2 %.
_EVERY, _ENDS = 6, 2


def losses(program: Program, reader: TensorReader, coarse: Coarse, tokens: U32) -> dict[str, float]:
    """Name of each matrix -> its loss: the mean KL divergence in nats when it is stored coarsely, to second order.

    tokens: u32[sequences, ctx]. If the logits of two predictions differ by a small d, they diverge by Var(d) / 2 under
    the first. The variance is taken over tokens drawn from it, so the copies need no output head. A few predictions
    would dominate a mean, so the result is the square of the mean root. Memory holds one layer's weights, the head, and
    copies of _MEASURED * _COPIED states for each matrix that is followed.
    """
    followed = _followed(program)
    seen, true = _pieces(tokens)
    head = program.logits.weight
    names: list[str] = []
    copies: list[Flow] = []
    nearby: dict[str, float] = {}
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(workers()) as pool:
        for stretch, weights in _read_ahead(pool, reader, stretches(program, _PIECE)):
            multiplied = sorted(stretch.multiplied & weights.keys())
            packed = dict(zip(multiplied, pool.map(rounded, (weights[name] for name in multiplied)), strict=True))
            known: dict[str, F32 | _Known] = {**weights, **_known(stretch, weights, packed)}
            passing = pool.submit(stretch, known, true)
            seen, moments = tapped(pool, stretch, {**weights, **packed}, seen, followed | {head})
            of_head = moments.pop(head, None)
            after = passing.result()
            near: dict[str, F32 | Near] = {
                name: each.near if isinstance(each, _Known) else each for name, each in known.items()
            }
            disturb = partial(_disturbed, stretch, near, weights, coarse, true)
            every = sorted({*multiplied, *_tables(stretch)})
            chosen = [name for name in every if name in followed]
            fitted = pool.map(disturb, chosen, (moments.get(name) for name in chosen))  # first: they take longest
            nearest = pool.map(disturb, every, repeat(None))
            copies = [*pool.map(partial(stretch, near), copies), *fitted]
            names += chosen
            nearby |= {name: _disturbance(after, flow) for name, flow in zip(every, nearest, strict=True)}
            true = after
    op, last = program.logits, reader(head)
    bias = None if op.bias is None else reader(op.bias)
    before = _scored(op, true)
    drawn = _drawn(logits(op, before, last, bias))
    rows = last[drawn]
    products = np.einsum("nh,ndh->nd", before, rows, dtype=np.float64)
    raw = op.scale * (products if bias is None else products + bias[drawn])
    measured = {
        name: _divergence(op, raw, _scored(op, copy) - before, rows) for name, copy in zip(names, copies, strict=True)
    }
    found = {reader.stored(name): loss for name, loss in _completed(measured, nearby).items()}
    changed = _CoarseTable.of(last, drawn, coarse, of_head)[drawn] - rows
    found[reader.stored(head)] = found.get(reader.stored(head), 0) + _divergence(op, raw, before, changed)
    return found


def _read_ahead(
    pool: ThreadPoolExecutor, reader: TensorReader, stretches: Iterable[Stretch]
) -> Iterator[tuple[Stretch, dict[str, F32]]]:
    """Each stretch with its tensors, which are read while the one before is in use."""
    waiting: list[tuple[Stretch, Future[dict[str, F32]]]] = []
    for stretch in stretches:
        waiting.append((stretch, pool.submit(reader.of, stretch)))
        if len(waiting) > 1:
            before, weights = waiting.pop(0)
            yield before, weights.result()
    for stretch, weights in waiting:
        yield stretch, weights.result()


def _followed(program: Program) -> set[str]:
    """The matrices whose copies pass through all later layers."""
    found: set[str] = set()
    for by_layer in _by_name(clusterable(program)).values():
        names = [*by_layer.values()]
        found.update(names[::_EVERY], names[:_ENDS], names[-_ENDS:])
    return found


def _by_name(matrices: Iterable[str]) -> dict[str, dict[int, str]]:
    """Matrices by their names within a layer, and by layer, -1 outside all layers."""
    found: dict[str, dict[int, str]] = {}
    for name in matrices:
        layer = layer_of(name)
        within, number = (name, -1) if layer is None else (name.removeprefix(layer_prefix(layer)), layer)
        found.setdefault(within, {})[number] = name
    return found


def _disturbance(true: Flow, changed: Flow) -> float:
    """The relative change of a flow at the scored tokens: the square of the mean root, summed over its values."""
    total = 0.0
    for value, each in true.values.items():
        change, size = (
            np.square(x[:, -_SCORED:], dtype=np.float64).sum(axis=-1) for x in (changed.values[value] - each, each)
        )
        total += float(np.sqrt(change / np.maximum(size, np.finfo(np.float32).tiny)).mean() ** 2)
    return total


def _completed(measured: Mapping[str, float], nearby: Mapping[str, float]) -> dict[str, float]:
    """The loss of every matrix in `nearby`, which has its disturbance of the stream behind its layer.

    The ratio of both changes smoothly from layer to layer, so where no loss was measured it is interpolated.
    """
    found = dict(measured)
    for by_layer in _by_name(nearby).values():
        ratios = {
            layer: np.log(measured[name] / nearby[name])
            for layer, name in by_layer.items()
            if measured.get(name, 0) > 0 and nearby[name] > 0
        }
        for layer, name in by_layer.items():
            if name not in measured:
                ratio = np.exp(np.interp(layer, [*ratios], [*ratios.values()])) if ratios else 0.0
                found[name] = nearby[name] * float(ratio)
    return found


def _pieces(tokens: U32) -> tuple[list[Flow], Flow]:
    """Pieces of the text for the moments, several in each flow, and the ends of others, which are measured."""
    piece = min(_PIECE, tokens.shape[1])
    tokens = tokens[:, : tokens.shape[1] // piece * piece].reshape(-1, piece)
    spread = np.linspace(0, len(tokens) - 1, _SEEN + _MEASURED).astype(int)
    of_measured = np.isin(np.arange(len(spread)), np.linspace(0, len(spread) - 1, _MEASURED).astype(int))
    seen = np.array_split(tokens[spread[~of_measured]], _SEEN // _TOGETHER)
    return [Flow(ids) for ids in seen], Flow(tokens[spread[of_measured], -_COPIED:])


class _CoarseTable:
    """The rows of a coarse embedding for some tokens."""

    def __init__(self, ids: NDArray[np.integer], rows: F32) -> None:
        self._ids, self._rows = ids, rows

    @classmethod
    def of(cls, weights: F32, ids: NDArray[np.integer], coarse: Coarse, moments: Moments | None) -> _CoarseTable:
        spread = np.linspace(0, len(weights) - 1, min(_ROWS, len(weights))).astype(int)
        needed = np.union1d(ids, spread)
        return cls(needed, coarse(weights[needed], moments))

    def __getitem__(self, ids: NDArray[np.integer]) -> F32:
        """f32[ids' shape, cols]"""
        return self._rows[np.searchsorted(self._ids, ids)]


class _Known:
    """A matrix in f32 that keeps the input and the output of its only product, for those of inputs `near` it."""

    near: Near

    def __init__(self, weights: F32, packed: Panels) -> None:
        self._weights, self._packed = weights, packed

    def product(self, x: F32) -> F32:
        y: F32 = x @ self._weights.T
        self.near = Near(self._packed, x, y)
        return y


def _known(stretch: Stretch, weights: Mapping[str, F32], packed: Mapping[str, Any]) -> dict[str, _Known]:
    """The matrices of a stretch; not stacks, because tokens of a copy may go to other experts."""
    uses = Counter(stretch.prefix + name for op in stretch.ops for name in op.tensor_names())
    return {
        name: _Known(weights[name], each)
        for name, each in packed.items()
        if isinstance(each, Panels) and uses[name] == 1
    }


def _tables(stretch: Stretch) -> set[str]:
    return {stretch.prefix + op.table for op in stretch.ops if isinstance(op, Embed)}


def _disturbed(
    stretch: Stretch,
    near: Weights,
    weights: Mapping[str, F32],
    coarse: Coarse,
    true: Flow,
    name: str,
    moments: Moments | None,
) -> Flow:
    """The flow after a stretch if this table or matrix alone is coarse. moments: to fit it to."""
    if name in _tables(stretch):
        stored: Any = _CoarseTable.of(weights[name], true.ids, coarse, None)
    else:
        stored = coarse(weights[name], moments)
    return stretch({**near, name: stored}, true)


def _scored(op: Logits, flow: Flow) -> F32:
    """The input of the logits at the scored tokens, f32[predictions, hidden]."""
    x = flow.values[op.src][:, -_SCORED:]
    return cast(F32, x.reshape(-1, x.shape[-1]))


def _divergence(op: Logits, raw: NDArray[np.float64], states: F32, changed_rows: F32) -> float:
    """The divergence from a change of the logits of drawn tokens: states @ changed_rows.

    raw: f64[predictions, draws], their logits before a softcap. Either `states`, f32[predictions, hidden], is a change
    of the input of the logits, or `changed_rows`, f32[predictions, draws, hidden], one of the rows of the drawn tokens.
    """
    changes = op.scale * np.einsum("nh,ndh->nd", states, changed_rows, dtype=np.float64)
    if op.softcap is not None:
        changes = op.softcap * (np.tanh((raw + changes) / op.softcap) - np.tanh(raw / op.softcap))
    return float(changes.std(axis=1, ddof=1).mean() ** 2 / 2)


def _drawn(scores: F32) -> NDArray[np.int64]:
    """Tokens drawn from each prediction, i64[predictions, _DRAWS]."""
    random = np.random.Generator(np.random.Philox(key=0))
    shares = np.exp((scores - scores.max(axis=1, keepdims=True)).astype(np.float64)).cumsum(axis=1)
    points = random.random((len(scores), _DRAWS)) * shares[:, -1:]
    found = [np.searchsorted(row, each, side="right") for row, each in zip(shares, points, strict=True)]
    return np.minimum(found, scores.shape[1] - 1)
