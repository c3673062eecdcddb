"""The passes of a calibration in torch, on a CPU or a GPU: the same text, moments and losses, differently rounded.

The text comes from the whole model, in bf16 on a GPU; moments and losses from one layer at a time in f32. Clustering
stays on the CPU.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rkf.calibrate import divergences
from rkf.calibrate.divergences import Coarse, Measured
from rkf.calibrate.moments import Moments, shrunk
from rkf.calibrate.passes import F32, U32, TensorReader, given_tokens, points, stretches
from rkf.calibrate.torch_stretch import TorchFlow, TorchStretch
from rkf.errors import UsageError
from rkf.format.codec import workers
from rkf.format.matrix import DenseTensor
from rkf.model.program import Program
from rkf.runtime.model import TORCH_DEVICES
from rkf.runtime.torch_model import Decoder
from rkf.runtime.torch_pass import RopeTables
from rkf.worker_threads import WorkerThreads

_READ_TOKENS = 4096  # of a batch: of a width of 28,672 their activations take 470 MB
_WHOLE = float(1 << 40)  # probabilities as whole numbers; those of 2^22 tokens fit into 63 bits


class TorchDevice:
    """name: as `--device` takes it. Raises UsageError if torch finds no such device.

    The same device and the same versions give the same results, as far as torch can promise it: of what is used here it
    promises nothing for the cumulative sums of recurrent layers on a GPU.
    """

    def __init__(self, name: str) -> None:
        if name not in TORCH_DEVICES:
            raise UsageError(f"device: expected cpu, {' or '.join(TORCH_DEVICES)}, got {name!r}")
        if TORCH_DEVICES[name] == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"device {name}: torch finds no GPU here: omit --device")
        self.name = name
        self._device = torch.device(TORCH_DEVICES[name])
        self._dtype = torch.float32 if self._device.type == "cpu" else torch.bfloat16

    def write_text(
        self,
        program: Program,
        reader: TensorReader,
        prompts: Sequence[Sequence[int]],
        *,
        ctx: int,
        folder: Path,
        progress: Callable[[int, int], None] | None,
    ) -> U32:
        """As `rkf.calibrate.passes.write_text`, with the same draws; the device holds the whole model."""
        tokens, given = given_tokens(prompts, ctx)
        with self._computing():
            decoder = Decoder(_Checkpoint(reader), program, self._dtype).to(self._device).requires_grad_(False)
            cache = decoder.new_cache(len(prompts), ctx)
            for position in range(1, ctx):
                last = torch.from_numpy(tokens[:, position - 1 : position].astype(np.int64)).to(self._device)
                found = decoder.head(decoder(last, cache)[:, 0])
                drawn = _drawn(found, points(0, position, len(prompts)))
                tokens[:, position] = np.where(given[:, position], tokens[:, position], drawn)
                if progress is not None:
                    progress(position + 1, ctx)
        return tokens

    def moments(self, program: Program, reader: TensorReader, tokens: U32) -> Iterator[Mapping[str, Moments]]:
        """As `rkf.calibrate.passes.moments`. The device holds one layer, and the values of all tokens between two."""
        together = max(1, _READ_TOKENS // tokens.shape[1])
        batches = [tokens[start : start + together] for start in range(0, len(tokens), together)]
        with self._computing():
            ropes = RopeTables(program.ropes).to(self._device)
            flows = [self._flow(ids) for ids in batches]
        for stretch in stretches(program, tokens.shape[1]):
            with self._computing():
                weights = reader.of(stretch)
                run = TorchStretch(stretch, weights, ropes, self._device)
                flows, found = _tapped(run, stretch.matrices, weights, flows)
            if found:
                yield found

    def losses(self, program: Program, reader: TensorReader, coarse: Coarse, tokens: U32) -> dict[str, float]:
        """As `rkf.calibrate.sensitivity.losses`; coarse matrices are made on the CPU."""
        followed, head = divergences.followed(program), program.logits.weight
        batches, measured = divergences.pieces(tokens)
        copies: dict[str, TorchFlow] = {}
        nearby: dict[str, float] = {}
        of_head: Moments | None = None
        with self._computing(), WorkerThreads(workers()) as pool:
            ropes = RopeTables(program.ropes).to(self._device)
            seen, true = [self._flow(ids) for ids in batches], self._flow(measured)
            for stretch in stretches(program, divergences.PIECE):
                weights = reader.of(stretch)
                run = TorchStretch(stretch, weights, ropes, self._device)
                wanted = {
                    first: names
                    for first, names in stretch.matrices.items()
                    if not (followed | {head}).isdisjoint(names)
                }
                seen, moments = _tapped(run, wanted, weights, seen)
                of_head = moments.pop(head, None)
                after = run(true)
                every = sorted((stretch.multiplied & weights.keys()) | stretch.tables)
                chosen = [name for name in every if name in followed]
                make = partial(_coarse, weights, stretch.tables, measured, coarse)
                fitted = pool.map(make, chosen, (moments.get(name) for name in chosen))
                nearest = pool.map(make, every, repeat(None))
                copies = {name: run(copy) for name, copy in copies.items()}
                for name, changed in zip(chosen, fitted, strict=True):
                    with run.replaced(name, changed):
                        copies[name] = run(true)
                values = _arrays(after)
                for name, changed in zip(every, nearest, strict=True):
                    with run.replaced(name, changed):
                        nearby[name] = divergences.disturbance(values, _arrays(run(true)))
                true = after
            src = program.logits.src
            ends = {name: divergences.scored(_arrays(copy)[src]) for name, copy in copies.items()}
            found = Measured(divergences.scored(_arrays(true)[src]), ends, nearby, of_head)
        return divergences.losses(program, reader, coarse, found)

    def _flow(self, ids: U32) -> TorchFlow:
        return TorchFlow(torch.from_numpy(ids.astype(np.int64)).to(self._device))

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Without gradients, with repeatable products. Raises UsageError where the device's memory is too small."""
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its results only with this
        before = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*deterministic")
                yield
        except torch.OutOfMemoryError as error:
            raise UsageError(f"device {self.name}: out of memory while calibrating: omit --device") from error
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """A checkpoint as a source of modules."""

    reader: TensorReader

    def stored_name(self, name: str) -> str:
        return self.reader.stored(name)

    def load(self, name: str) -> DenseTensor:
        return DenseTensor("f32", self.reader.read(name))

    def decode(self, name: str) -> F32:
        return self.reader(name)


class _Sum:
    """The sum of x^T x over tokens, on the device."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        """x: f32[..., cols]"""
        x = x.flatten(0, -2)
        product = x.T @ x
        self._sum = product if self._sum is None else self._sum.add_(product)
        self._tokens += len(x)

    @property
    def tokens(self) -> int:
        return self._tokens

    def mean(self) -> F32:
        """E[x^T x], shrunk, of at least one token: f32[cols, cols]."""
        if self._sum is None:
            raise ValueError("no token was seen")
        return shrunk((self._sum / self._tokens).cpu().numpy(), self._tokens)


class _Stack:
    """The second moments of the inputs of each matrix of a stack; those of one are computed on demand."""

    def __init__(self, inputs: Mapping[int, list[Tensor]], matrices: int) -> None:
        self._inputs, self._matrices = inputs, matrices

    @property
    def counts(self) -> NDArray[np.int64]:
        """The number of tokens that each matrix saw."""
        return np.array([sum(map(len, self._inputs.get(number, ()))) for number in range(self._matrices)])

    def of(self, expert: int) -> F32:
        """E[x^T x] of the inputs of one that saw some, f32[cols, cols]."""
        total = _Sum()
        for x in self._inputs[expert]:
            total.add(x)
        return total.mean()


def _tapped(
    run: TorchStretch, groups: Mapping[str, Collection[str]], weights: Mapping[str, F32], flows: Sequence[TorchFlow]
) -> tuple[list[TorchFlow], dict[str, Moments]]:
    """The flows after a stretch, and the second moments of the wanted matrices' inputs over all flows, by full name.

    groups: the names of those that share an input, by the first.
    """
    sums: dict[str, _Sum] = {}
    stacks: dict[str, dict[int, list[Tensor]]] = {}

    def tap(name: str, x: Tensor, number: int | None) -> None:
        if name not in groups:
            return
        if number is None:
            sums.setdefault(name, _Sum()).add(x)
        else:
            stacks.setdefault(name, {}).setdefault(number, []).append(x)

    after = [run(flow, tap) for flow in flows]
    found: dict[str, Moments] = {name: each.mean() for name, each in sums.items()}
    found |= {name: _Stack(inputs, len(weights[name])) for name, inputs in stacks.items()}
    return after, {name: found[first] for first, names in groups.items() for name in names}


def _coarse(
    weights: Mapping[str, F32], tables: Collection[str], ids: U32, coarse: Coarse, name: str, moments: Moments | None
) -> F32:
    """A coarse matrix, stack or table; of a table, the rows that `ids` need are."""
    if name not in tables:
        return coarse(weights[name], moments)
    numbers, rows = divergences.coarse_rows(weights[name], ids, coarse, None)
    changed = weights[name].copy()
    changed[numbers] = rows
    return changed


def _arrays(flow: TorchFlow) -> dict[str, F32]:
    return {name: each.cpu().numpy() for name, each in flow.values.items()}


def _drawn(logits: Tensor, points: NDArray[np.float64]) -> NDArray[np.int64]:
    """The token whose share of [0, 1) contains each row's point. logits: [rows, vocab]; points: f64[rows].

    Shares are whole numbers: a GPU adds those in any order to the same sums.
    """
    cumulative = (logits.double().softmax(-1) * _WHOLE).long().cumsum(-1)
    wanted = (torch.from_numpy(points).to(logits.device) * cumulative[:, -1]).long()
    found = torch.searchsorted(cumulative, wanted[:, None], right=True)[:, 0]
    return found.clamp(max=logits.shape[1] - 1).cpu().numpy()
