"""The tensors of a model as torch modules, by the names that ops give them; tied ones are shared. Knows no op."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from rkf.format.matrix import F32, ClusteredMatrix, DenseTensor
from rkf.model.program import layer_prefix
from rkf.torch import ClusteredEmbedding, ClusteredLinear, ClusteredStack, ClusteredWeight
from rkf.torch.loading import dense


class TensorSource(Protocol):
    """Tensors by name: those of a container, or of a checkpoint."""

    def stored_name(self, name: str) -> str:
        """The tensor that stores a tensor's numbers: an alias followed, any other name as it is."""
        ...

    def load(self, name: str) -> DenseTensor | ClusteredMatrix: ...

    def decode(self, name: str) -> F32: ...


@dataclass(frozen=True, slots=True)
class TorchTensors:
    """dtype: that of dense matrices, and so of activations. layer: the layer of the names; None outside layers.

    clustered: every clustered matrix so far, by the name under which it is stored.
    """

    source: TensorSource
    dtype: torch.dtype
    layer: int | None = None
    clustered: dict[str, ClusteredWeight] = field(default_factory=dict)
    dense: dict[str, nn.Parameter] = field(default_factory=dict)

    def at(self, layer: int) -> TorchTensors:
        """The same for the names inside a layer."""
        return replace(self, layer=layer)

    def vector(self, name: str, dtype: torch.dtype = torch.float32) -> nn.Parameter:
        """A small tensor, decoded: norms, biases, routers."""
        values = torch.from_numpy(self.source.decode(self._full(name)).copy())
        return nn.Parameter(values.to(dtype), requires_grad=False)

    def optional(self, name: str | None, dtype: torch.dtype = torch.float32) -> nn.Parameter | None:
        """The vector of an optional name."""
        return None if name is None else self.vector(name, dtype)

    def linear(self, name: str, bias: str | None = None) -> nn.Module:
        """x: [..., cols] -> [..., rows]."""
        weight, vector = self._matrix(name), self.optional(bias, self.dtype)
        if isinstance(weight, ClusteredWeight):
            return ClusteredLinear(weight, vector)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = weight
        layer.register_parameter("bias", vector)
        return layer

    def embedding(self, name: str) -> nn.Module:
        """ids: i64[...] -> [..., cols]."""
        weight = self._matrix(name)
        if isinstance(weight, ClusteredWeight):
            return ClusteredEmbedding(weight)
        return nn.Embedding.from_pretrained(weight)

    def stack(self, name: str) -> nn.Module:
        """(x: [..., cols], number) -> [..., rows], by one matrix of [n, rows, cols]."""
        weight = self._matrix(name)
        return ClusteredStack(weight) if isinstance(weight, ClusteredWeight) else _DenseStack(weight)

    def _full(self, name: str) -> str:
        return name if self.layer is None else layer_prefix(self.layer) + name

    def _matrix(self, name: str) -> nn.Parameter | ClusteredWeight:
        stored = self.source.stored_name(self._full(name))
        if stored in self.clustered:
            return self.clustered[stored]
        if stored in self.dense:
            return self.dense[stored]
        tensor = self.source.load(stored)
        if isinstance(tensor, ClusteredMatrix):
            return self.clustered.setdefault(stored, ClusteredWeight(tensor))
        return self.dense.setdefault(stored, nn.Parameter(dense(tensor).to(self.dtype), requires_grad=False))


class _DenseStack(nn.Module):
    """weight: [n, rows, cols]."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, number: int) -> Tensor:
        return functional.linear(x, self.weight[number])
