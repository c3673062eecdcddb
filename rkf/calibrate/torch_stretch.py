"""A stretch of a program on a torch device, in f32, that shows the inputs of its matrices. Knows no file.

The same ops as modules that the torch backend runs; `rkf.calibrate.interpreter` is the numpy form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from rkf.calibrate.interpreter import Stretch
from rkf.format.matrix import F32, DenseTensor
from rkf.model.ops import Logits
from rkf.runtime.torch_ops import TorchOps
from rkf.runtime.torch_pass import RopeTables, TorchPass
from rkf.runtime.torch_past import KeysValues, NoPast
from rkf.runtime.torch_tensors import TorchTensors

Tap = Callable[[str, Tensor, int | None], None]
"""Called with the full name of the first matrix that reads an input, the input [..., cols], and the number of the
matrix if the name is that of a stack.
"""


@dataclass(frozen=True, slots=True)
class TorchFlow:
    """The values passed from one stretch to the next, for a batch of sequences (`rkf.calibrate.interpreter.Flow`).

    ids: i64[batch, tokens]. values: f32[batch, tokens, width] by name. shared: by layer.
    """

    ids: Tensor
    values: Mapping[str, Tensor] = field(default_factory=dict)
    shared: Mapping[int, KeysValues] = field(default_factory=dict)


class TorchStretch:
    """The ops of a stretch with their weights. weights: all tensors of the stretch by full name."""

    def __init__(self, stretch: Stretch, weights: Mapping[str, F32], ropes: RopeTables, device: torch.device) -> None:
        self._stretch, self._ropes, self._device = stretch, ropes, device
        self._matrices: dict[str, nn.Module] = {}
        self._tap: Tap | None = None
        ops = tuple(op for op in stretch.ops if not isinstance(op, Logits))
        layer = stretch.layer if stretch.layer >= 0 else None
        self._ops = TorchOps(ops, _ShownTensors(_Weights(weights), torch.float32, layer, shown=self._show)).to(device)
        self._logits = next((op for op in stretch.ops if isinstance(op, Logits)), None)

    def __call__(self, flow: TorchFlow, tap: Tap | None = None) -> TorchFlow:
        """The flow after this stretch, whose sequences start here."""
        past = _Shared(flow, self._device)
        values = dict(flow.values)
        self._tap = tap
        self._ops(TorchPass(self._ropes, flow.ids, past), values)
        if self._logits is not None:
            self._see(self._stretch.prefix + self._logits.weight, values[self._logits.src], None)
        self._tap = None
        own = past.slots if self._stretch.is_shared else flow.shared
        return TorchFlow(flow.ids, {name: values[name] for name in self._stretch.keeps}, own)

    @contextmanager
    def replaced(self, name: str, weights: F32) -> Iterator[None]:
        """With other weights in place of a matrix, stack or table, by full name."""
        parameter = self._matrices[name].weight
        if not isinstance(parameter, nn.Parameter):
            raise TypeError(f"{name}: expected a dense matrix")
        before = parameter.data
        parameter.data = torch.from_numpy(np.ascontiguousarray(weights)).to(self._device)
        try:
            yield
        finally:
            parameter.data = before

    def _show(self, name: str, matrix: nn.Module) -> None:
        """Keep a matrix under its full name, and show its inputs to the tap."""
        self._matrices[name] = matrix

        def see(module: nn.Module, inputs: tuple[Tensor] | tuple[Tensor, int]) -> None:
            self._see(name, inputs[0], inputs[1] if len(inputs) == 2 else None)

        if name in self._stretch.matrices:  # the first of those that share an input
            matrix.register_forward_pre_hook(see)

    def _see(self, name: str, x: Tensor, number: int | None) -> None:
        if self._tap is not None:
            self._tap(name, x, number)


class _Shared(NoPast):
    """Keys and values of earlier layers, and of this one."""

    def __init__(self, flow: TorchFlow, device: torch.device) -> None:
        super().__init__(flow.ids.shape[1], device)
        self.slots = dict(flow.shared)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> KeysValues:
        self.slots[layer] = keys, values
        return keys, values

    def held(self, layer: int) -> KeysValues:
        return self.slots[layer]


@dataclass(frozen=True, slots=True)
class _Weights:
    """Tensors in memory as a source of modules."""

    tensors: Mapping[str, F32]

    def stored_name(self, name: str) -> str:
        return name

    def load(self, name: str) -> DenseTensor:
        return DenseTensor("f32", self.tensors[name])

    def decode(self, name: str) -> F32:
        return self.tensors[name]


@dataclass(frozen=True, kw_only=True)
class _ShownTensors(TorchTensors):
    """shown: called with the full name and the module of every matrix, stack and table."""

    shown: Callable[[str, nn.Module], None]

    def linear(self, name: str, bias: str | None = None) -> nn.Module:
        return self._made(name, super().linear(name, bias))

    def embedding(self, name: str) -> nn.Module:
        return self._made(name, super().embedding(name))

    def stack(self, name: str) -> nn.Module:
        return self._made(name, super().stack(name))

    def _made(self, name: str, module: nn.Module) -> nn.Module:
        self.shown(self._full(name), module)
        return module
