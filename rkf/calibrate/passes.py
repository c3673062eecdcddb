"""Passes over a text: generates a model's own text, and computes the second moments of every matrix's inputs.

Runs the program of any model. A callable supplies the weights, so a checkpoint needs no conversion first. Knows no file
and no clustering.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from rkf.calibrate.batch_cache import BatchCache
from rkf.calibrate.interpreter import Flow, Stretch, logits
from rkf.calibrate.moments import Moments, tapped
from rkf.format.codec import in_order, workers
from rkf.model.op import EMBEDDING, MATRIX, STACK
from rkf.model.program import Program
from rkf.numbers.eight_bits import Panels
from rkf.worker_threads import WorkerThreads

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Kept: TypeAlias = F32 | Panels | list[Panels]
U32 = NDArray[np.uint32]

# The work of one thread, of fixed size so that results do not depend on the number of threads. When generating, a chunk
# reads all weights for one token of each of its sequences. When reading, it holds the activations of this many tokens;
# those of 1,024 and a width of 8,960 would take 37 MB, for which the system gives fresh pages every time.
_WRITTEN_SEQUENCES, _READ_TOKENS = 16, 512


class Rows(Protocol):
    """A table, to be indexed with tokens."""

    def __len__(self) -> int: ...

    def __getitem__(self, ids: NDArray[np.integer]) -> F32:
        """f32[ids' shape, cols]"""
        ...


@dataclass(frozen=True, slots=True)
class TensorReader:
    """The tensors of a checkpoint by their names in the program. aliases: name -> the stored tensor. table: reads one
    that is only indexed, which need not be in f32 as a whole; by default `read` does.
    """

    read: Callable[[str], F32]
    aliases: Mapping[str, str] = field(default_factory=dict)
    table: Callable[[str], Rows] | None = None

    def stored(self, name: str) -> str:
        """The name under which a tensor is stored."""
        return self.aliases.get(name, name)

    def __call__(self, name: str) -> F32:
        return self.read(self.stored(name))

    def rows(self, name: str) -> Rows:
        """A table."""
        return (self.table or self.read)(self.stored(name))

    def of(self, stretch: Stretch) -> dict[str, F32]:
        """All tensors of a stretch, in f32."""
        return {name: self(name) for name in stretch.names}

    def indexed(self, stretch: Stretch) -> dict[str, Any]:
        """The same, but tables as rows."""
        return {name: self.rows(name) if name in stretch.tables else self(name) for name in stretch.names}

    def rounded(self, stretch: Stretch) -> dict[str, Any]:
        """The same as `indexed` with matrices in eight bits."""
        found = self.indexed(stretch)
        return {name: rounded(each) if name in stretch.multiplied else each for name, each in found.items()}


def rounded(weights: F32) -> Panels | list[Panels]:
    """A matrix, or a stack of them, in eight bits."""
    return Panels.of(weights) if weights.ndim == 2 else [Panels.of(each) for each in weights]


def stretches(program: Program, positions: int) -> Iterator[Stretch]:
    """The stem, each layer, and the top, for sequences of at most this many tokens."""
    yield Stretch.stem(program, positions)
    for layer in range(program.layers):
        yield Stretch.of_layer(program, layer, positions)
    yield Stretch.top(program, positions)


def write_text(
    program: Program,
    reader: TensorReader,
    prompts: Sequence[Sequence[int]],
    *,
    ctx: int,
    seed: int = 0,
    keep: Callable[[Panels], Panels] = lambda weights: weights,
    progress: Callable[[int, int], None] | None = None,
) -> U32:
    """The text that the model generates after each prompt at temperature 1, u32[prompts, ctx], prompts included.

    Token t of sequence i is drawn with number i of Philox stream `seed` at counter t. Memory holds the matrices, each
    in the form that `keep` returns, and the keys and values of all texts and layers in 16 bits.
    """
    model = list(stretches(program, ctx))
    kept = _kept(program, model, reader, keep)
    op = program.logits
    head, bias = cast(Panels, kept[op.weight]), None if op.bias is None else cast(F32, kept[op.bias])
    chunks = [
        range(start, min(start + _WRITTEN_SEQUENCES, len(prompts)))
        for start in range(0, len(prompts), _WRITTEN_SEQUENCES)
    ]
    caches = [BatchCache(program, len(chunk), ctx) for chunk in chunks]
    tokens, given = given_tokens(prompts, ctx)

    def step(chunk: range, cache: BatchCache, position: int) -> None:
        rows = slice(chunk.start, chunk.stop)
        flow = Flow(tokens[rows, position - 1][:, None])
        for stretch in model:
            flow = stretch(kept, flow, cache)
        cache.advance(1)
        drawn = _drawn(logits(op, flow.values[op.src][:, 0], head, bias), points(seed, position, len(prompts))[rows])
        tokens[rows, position] = np.where(given[rows, position], tokens[rows, position], drawn)

    with threadpool_limits(1, "blas"), WorkerThreads(workers()) as pool:
        for position in range(1, ctx):
            list(pool.map(step, chunks, caches, repeat(position)))
            if progress is not None:
                progress(position + 1, ctx)
    return tokens


def given_tokens(prompts: Sequence[Sequence[int]], ctx: int) -> tuple[U32, NDArray[np.bool_]]:
    """(Texts of ctx tokens that begin with the prompts, whether a token is a prompt's), [prompts, ctx] each."""
    tokens = np.zeros((len(prompts), ctx), np.uint32)
    given = np.zeros((len(prompts), ctx), np.bool_)
    for number, prompt in enumerate(prompts):
        start = list(prompt)[:ctx]
        tokens[number, : len(start)], given[number, : len(start)] = start, True
    return tokens, given


def points(seed: int, position: int, count: int) -> F64:
    """The draws of the tokens at a position of `count` sequences: f64[count] in [0, 1)."""
    return np.random.Generator(np.random.Philox(key=seed, counter=position)).random(size=count)


def moments(program: Program, reader: TensorReader, tokens: U32) -> Iterator[Mapping[str, Moments]]:
    """Second moments E[x^T x] of the inputs of matrices by name, one layer after the other. Those of the stem, if it
    has matrices, come first; those of the top and its logits last. Matrices that read the same input share one object.

    tokens: u32[sequences, ctx]. Memory holds one layer's weights and moments, and the values that live through all
    layers.
    """
    together = max(1, _READ_TOKENS // tokens.shape[1])
    flows = [Flow(tokens[start : start + together]) for start in range(0, len(tokens), together)]
    with threadpool_limits(1, "blas"), WorkerThreads(workers()) as pool:
        for stretch in stretches(program, tokens.shape[1]):
            flows, found = tapped(pool, stretch, reader.rounded(stretch), flows)
            if found:
                yield found


def _drawn(scores: F32, points: F64) -> NDArray[np.int64]:
    """The token whose share of [0, 1) contains each row's point. scores: f32[rows, vocab]; points: f64[rows]."""
    found = []
    for row, point in zip(scores, points, strict=True):  # one by one: all at once takes four times the logits' size
        cumulative = np.cumsum(np.exp(row - row.max()), dtype=np.float64)
        found.append(np.searchsorted(cumulative, point * cumulative[-1], side="right"))
    return np.minimum(found, scores.shape[1] - 1)


def _kept(
    program: Program, model: Sequence[Stretch], reader: TensorReader, keep: Callable[[Panels], Panels]
) -> dict[str, Kept]:
    """All tensors by name: matrices and tables in eight bits, after `keep`, others in f32."""
    multiplied = {weight.name for weight in program.weights() if weight.role in (EMBEDDING, MATRIX, STACK)}
    names = [*(name for stretch in model for name in stretch.names), *program.logits.tensor_names()]
    needed = {reader.stored(name): name in multiplied for name in names}

    def read(name: str) -> Kept:
        return rounded(reader(name)) if needed[name] else reader(name)

    stored: dict[str, Kept] = {}
    for name, each in zip(needed, in_order(read, needed), strict=True):
        if isinstance(each, list):
            stored[name] = [keep(matrix) for matrix in each]
        else:
            stored[name] = keep(each) if isinstance(each, Panels) else each
    return {name: stored[reader.stored(name)] for name in names}
