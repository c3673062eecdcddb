"""What every measurement of losses shares: the pieces of text, the matrices that are followed, and how a loss follows
from the states at the end (`rkf.calibrate.sensitivity` says how those are made). Knows no device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rkf.calibrate.interpreter import logits
from rkf.calibrate.moments import Moments
from rkf.calibrate.passes import F32, U32, Rows, TensorReader
from rkf.model.ops import Logits
from rkf.model.program import Program, layer_of, layer_prefix
from rkf.model.roles import clusterable

Coarse = Callable[[F32, "Moments | None"], F32]
"""Weights as a coarse file would store them. If the second moments of their inputs are given, fitted to those."""

PIECE = 128  # tokens of a piece of text
_SEEN = 40  # pieces for the moments of the inputs
_MEASURED = 8  # other pieces, from which copies are made; K chosen with 12 loses 3.5 % less than with 3
_COPIED, _SCORED = 96, 48  # their last tokens: after little context the first layers seem more important than they are
_DRAWS = 16  # tokens drawn from each prediction
_ROWS = 4096  # rows of the embedding beyond the needed ones, so that its centroids match those of the whole
_TOGETHER = 4  # pieces of one batch
# Of the matrices of one name, every sixth is followed to the end, and two at either end of the model. On a 135M model
# of 30 layers the other losses are then wrong by a factor of 1.2 (one deviation; the same with every third, 1.6 if the
# disturbance is left out). Choosing K by them costs 2.5 to 2.8 % more loss at equal size: disturbances are those of
# nearest centroids, a tenth of the time. Fitted to the moments of all layers it costs 0.7 to 1.2 %.
_EVERY, _ENDS = 6, 2


@dataclass(frozen=True, slots=True)
class Measured:
    """What the passes found.

    true: f32[predictions, hidden], the input of the logits at the scored tokens. changed: the same with one followed
    matrix coarse, by its name. nearby: the disturbance of the stream behind its layer, of every matrix and table.
    of_head: the moments of the head's inputs.
    """

    true: F32
    changed: Mapping[str, F32]
    nearby: Mapping[str, float]
    of_head: Moments | None


def followed(program: Program) -> set[str]:
    """The matrices whose copies pass through all later layers."""
    found: set[str] = set()
    for by_layer in _by_name(clusterable(program)).values():
        names = [*by_layer.values()]
        found.update(names[::_EVERY], names[:_ENDS], names[-_ENDS:])
    return found


def pieces(tokens: U32) -> tuple[list[U32], U32]:
    """Batches of pieces of the text for the moments, and the ends of other pieces, which are measured.

    tokens: u32[sequences, ctx]
    """
    piece = min(PIECE, tokens.shape[1])
    tokens = tokens[:, : tokens.shape[1] // piece * piece].reshape(-1, piece)
    spread = np.linspace(0, len(tokens) - 1, _SEEN + _MEASURED).astype(int)
    of_measured = np.isin(np.arange(len(spread)), np.linspace(0, len(spread) - 1, _MEASURED).astype(int))
    seen = np.array_split(tokens[spread[~of_measured]], _SEEN // _TOGETHER)
    return seen, tokens[spread[of_measured], -_COPIED:]


def scored(x: F32) -> F32:
    """The scored tokens of f32[batch, tokens, width], as f32[predictions, width]."""
    return x[:, -_SCORED:].reshape(-1, x.shape[-1])


def disturbance(true: Mapping[str, F32], changed: Mapping[str, F32]) -> float:
    """The relative change of values at the scored tokens: the square of the mean root, summed over the values.

    true, changed: f32[batch, tokens, width] by name
    """
    total = 0.0
    for value, each in true.items():
        change, size = (
            np.square(x[:, -_SCORED:], dtype=np.float64).sum(axis=-1) for x in (changed[value] - each, each)
        )
        total += float(np.sqrt(change / np.maximum(size, np.finfo(np.float32).tiny)).mean() ** 2)
    return total


def coarse_rows(
    weights: Rows, ids: NDArray[np.integer], coarse: Coarse, moments: Moments | None
) -> tuple[NDArray[np.integer], F32]:
    """(Rows of a table by number, ascending; f32[rows, cols], coarse): those that `ids` need, and some others."""
    spread = np.linspace(0, len(weights) - 1, min(_ROWS, len(weights))).astype(int)
    needed = np.union1d(ids, spread)
    return needed, coarse(weights[needed], moments)


def losses(program: Program, reader: TensorReader, coarse: Coarse, measured: Measured) -> dict[str, float]:
    """Name of each matrix, as stored -> its loss: the mean KL divergence in nats when it is stored coarsely, to second
    order.

    If the logits of two predictions differ by a small d, they diverge by Var(d) / 2 under the first. The variance is
    taken over tokens drawn from it, so the copies need no output head. A few predictions would dominate a mean, so the
    result is the square of the mean root.
    """
    op, before = program.logits, measured.true
    last = reader(op.weight)
    bias = None if op.bias is None else reader(op.bias)
    drawn = _drawn(logits(op, before, last, bias))
    rows = last[drawn]
    products = np.einsum("nh,ndh->nd", before, rows, dtype=np.float64)
    raw = op.scale * (products if bias is None else products + bias[drawn])
    ends = {name: _divergence(op, raw, states - before, rows) for name, states in measured.changed.items()}
    found = {reader.stored(name): loss for name, loss in _completed(ends, measured.nearby).items()}
    numbers, changed = coarse_rows(last, drawn, coarse, measured.of_head)
    changes = changed[np.searchsorted(numbers, drawn)] - rows
    head = reader.stored(op.weight)
    found[head] = found.get(head, 0) + _divergence(op, raw, before, changes)
    return found


def _by_name(matrices: Iterable[str]) -> dict[str, dict[int, str]]:
    """Matrices by their names within a layer, and by layer, -1 outside all layers."""
    found: dict[str, dict[int, str]] = {}
    for name in matrices:
        layer = layer_of(name)
        within, number = (name, -1) if layer is None else (name.removeprefix(layer_prefix(layer)), layer)
        found.setdefault(within, {})[number] = name
    return found


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
