"""Second moments for the rows of embeddings, which have no inputs. Knows no clustering.

An error d of a row changes the values behind the first layer by J d. E[J^T J] is to the row what the moments of inputs
are to a row of a matrix. J is measured: a text passes once more for each column, with that column of its rows changed.
On a 0.5B model, rows clustered for it lose 0.6 to 0.7 of the divergence of nearest centroids; gradients of the final
loss would reach 0.6, and the values behind later layers tell no more than those behind the first (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from rkf.calibrate.interpreter import Flow, Stretch
from rkf.calibrate.known import Known, known_matrices
from rkf.calibrate.passes import F32, U32, TensorReader, rounded
from rkf.format.codec import workers
from rkf.model.ops import Embed
from rkf.model.program import Program
from rkf.worker_threads import WorkerThreads

_SEQUENCES, _TOKENS = 8, 8  # of the text
_WIDEST = 8192  # columns; tables with parts for every layer are wider, and the first layer reads only its own
_HELD = 1 << 26  # numbers behind the layer that a thread may hold for all columns
_TOGETHER = 64  # columns changed in one pass, each in its own copy of the text
_CHANGE = np.float32(0.05)  # of a row's length; the errors of K = 16 are .1
# The share of the mean diagonal that is added to the diagonal: behind later layers, other directions count too.
_DAMPING = np.float32(0.1)
# The part of the table's moments in those of a table that is the head too. On a 135M model, K = 16, the divergence by
# this table alone was .096 with 0, .084 with .1, .079 with .3, .091 with .6 and .334 with 1.
_OF_TABLE = 0.3
_LEAST = np.float32(1e-3)  # of the largest row's size
_TINY = np.finfo(np.float32).tiny


def moments_of_tables(program: Program, reader: TensorReader, tokens: U32) -> dict[str, F32]:
    """E[J^T J], f32[cols, cols], of each embedding by name.

    tokens: u32[sequences, ctx]. Memory holds the first layer and, for each thread, the values behind it
    for all columns.
    """
    widths = {op.table: op.cols for op in program.stem if isinstance(op, Embed)}
    measured = [name for name, width in widths.items() if width <= _WIDEST]
    if not measured or not program.layers:
        return {}
    widest = max(widths[name] for name in measured)
    length = max(1, min(_TOKENS, tokens.shape[1], _HELD // widest**2))
    spread = np.linspace(0, len(tokens) - 1, min(_SEQUENCES, len(tokens))).astype(int)
    texts = tokens[spread, -length:]
    rows = {name: reader.rows(name)[texts] for name in widths}
    stem, layer = Stretch.stem(program, length), Stretch.of_layer(program, 0, length)
    plain, weights = {name: reader(name) for name in stem.names if name not in widths}, reader.of(layer)
    with threadpool_limits(1, "blas"), WorkerThreads(workers()) as pool:
        multiplied = sorted(layer.multiplied & weights.keys())
        packed = dict(zip(multiplied, pool.map(rounded, (weights[name] for name in multiplied)), strict=True))
        beginning = _Beginning(stem, layer, plain, weights, packed)
        return {
            name: _damped(sum(pool.map(partial(beginning.effects, name, texts, rows), range(len(texts)))))
            for name in measured
        }


def of_both(head: F32, table: F32) -> F32:
    """What errors of a table that is the output head too are weighed with. head: the second moments of the inputs of
    the logits; table: its own.
    """
    return _scaled(head, 1 - _OF_TABLE) + _scaled(table, _OF_TABLE)


def _scaled(moments: F32, mean: float) -> F32:
    """The moments with this mean of their diagonal; zeros stay."""
    found: F32 = moments * np.float32(mean * len(moments) / max(float(np.trace(moments)), 1e-30))
    return found


def _sizes(x: F32) -> F32:
    """The root mean square of each row. Rows of next to nothing count as larger, or their changes would be all."""
    found = np.sqrt(np.square(x).mean(axis=-1, keepdims=True))
    return np.maximum(found, max(_LEAST * found.max(), _TINY))


def _damped(moments: Any) -> F32:
    found = np.asarray(moments, np.float32)
    diagonal = np.einsum("ii->i", found)
    diagonal += _DAMPING * diagonal.mean()
    return found


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a table that a batch takes, whatever their ids: f32[batch, tokens, cols]."""

    rows: F32

    def __getitem__(self, ids: NDArray[np.integer]) -> F32:
        return self.rows


@dataclass(frozen=True, slots=True)
class _Beginning:
    """The stem and the first layer. plain: tensors of the stem but for its tables; weights, packed: of the layer."""

    stem: Stretch
    layer: Stretch
    plain: Mapping[str, F32]
    weights: Mapping[str, F32]
    packed: Mapping[str, Any]

    def effects(self, table: str, texts: U32, rows: Mapping[str, F32], number: int) -> F32:
        """The sum of J^T J over the tokens of one text, relative to the values behind the layer: f32[cols, cols].

        A column changes in all rows of the text at once, up or down at random: then the changes of other rows, which
        attention brings in, add no more than their own squares.
        """
        ids = np.repeat(texts[number][None], _TOGETHER, axis=0)
        copies = {name: np.repeat(each[number][None], _TOGETHER, axis=0) for name, each in rows.items()}
        known: dict[str, Any] = {**self.weights, **known_matrices(self.layer, self.weights, self.packed)}
        true = self._values(known, ids, copies)
        near = {name: each.near if isinstance(each, Known) else each for name, each in known.items()}
        sizes = {name: _sizes(x) for name, x in true.items()}
        columns = rows[table].shape[-1]
        signs = np.random.Generator(np.random.Philox(key=number)).choice(
            np.array([-1, 1], np.float32), len(texts[number])
        )
        change = _CHANGE * signs * np.linalg.norm(rows[table][number], axis=-1)
        effects = []
        for start in range(0, columns, _TOGETHER):
            together = range(min(_TOGETHER, columns - start))
            changed = copies[table].copy()
            for copy in together:
                changed[copy, :, start + copy] += change
            after = self._values(near, ids, {**copies, table: changed})
            parts = [(after[name] - x) / sizes[name] for name, x in true.items()]
            effects.append(np.concatenate([part.reshape(_TOGETHER, -1) for part in parts], axis=1)[: len(together)])
        found = np.concatenate(effects)
        product: F32 = found @ found.T
        return product

    def _values(self, weights: Mapping[str, Any], ids: U32, rows: Mapping[str, F32]) -> Mapping[str, F32]:
        """The values behind the layer."""
        tables: dict[str, Any] = {name: _Rows(each) for name, each in rows.items()}
        before = self.stem({**self.plain, **tables}, Flow(ids))
        return self.layer(weights, before).values
