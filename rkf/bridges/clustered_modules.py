"""Linear layers, embeddings and experts of any torch model that compute with clustered weights, changed in place.

A layer keeps its class's own forward (some embeddings scale their output): the clustered class is placed behind it in
the method order, so that `super().forward` reaches it. Knows torch, no file and no library of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from rkf.torch.clustered_layers import ClusteredLinear
from rkf.torch.hadamard_torch import transformed
from rkf.torch.weight import ClusteredWeight


class JoinedWeight(nn.Module):
    """A weight [rows, columns] made of the rows of one or more matrices, some of them clustered.

    parts: the matrices, [rows of the part, columns] each, as layers without bias. blocks: for each, the size of the
    Hadamard blocks that its inputs pass first, or None. order: i64[rows], which row of the parts, one below the other,
    each row is; None if they are in order. dtype: that of the weights that `forward` and `gather` return.
    """

    order: Tensor | None

    def __init__(
        self,
        parts: Sequence[ClusteredLinear | nn.Linear],
        blocks: Sequence[int | None],
        order: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.parts, self.blocks, self.dtype = nn.ModuleList(parts), tuple(blocks), dtype
        self.register_buffer("order", order)

    def product(self, x: Tensor) -> Tensor:
        """x: [..., columns] -> x times the transpose, [..., rows]."""
        turned = {block: x if block is None else transformed(x, block) for block in set(self.blocks)}
        y = torch.cat([part(turned[block]) for part, block in self._blocked()], dim=-1)
        return y if self.order is None else y.index_select(-1, self.order)

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of a weight that is one clustered matrix, i64[n] -> [n, columns]; differentiable in the values."""
        [(part, block)] = self._blocked()
        found = part.weight.gather(rows) if isinstance(part, ClusteredLinear) else part.weight[rows]
        return (found if block is None else transformed(found, block)).to(self.dtype)

    def forward(self) -> Tensor:
        """The whole weight, [rows, columns]; differentiable in the values."""
        dense = []
        for part, block in self._blocked():
            rows: Tensor = part.weight() if isinstance(part, ClusteredLinear) else part.weight
            dense.append((rows if block is None else transformed(rows, block)).to(self.dtype))
        joined = torch.cat(dense)
        return joined if self.order is None else joined[self.order]

    def _blocked(self) -> list[tuple[ClusteredLinear | nn.Linear, int | None]]:
        return list(zip(cast("Sequence[ClusteredLinear | nn.Linear]", self.parts), self.blocks, strict=True))


class JoinedStack(nn.Module):
    """Matrices [rows, columns] of one shape, one for each expert, made of the rows of one or more clustered stacks.

    parts: clustered [experts, rows of the part, columns]. blocks, order, dtype: as in JoinedWeight. transposed: whether
    a matrix is given as [columns, rows].
    """

    order: Tensor | None

    def __init__(
        self,
        parts: Sequence[ClusteredWeight],
        blocks: Sequence[int | None],
        order: Tensor | None,
        transposed: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.parts, self.blocks, self.transposed, self.dtype = nn.ModuleList(parts), tuple(blocks), transposed, dtype
        self.experts = parts[0].shape[0]
        self.register_buffer("order", order)

    def expert(self, number: int) -> Tensor:
        """The matrix of one expert; differentiable in the values."""
        dense = []
        for part, block in zip(cast("Sequence[ClusteredWeight]", self.parts), self.blocks, strict=True):
            rows = part.shape[1]
            found = part.decode(number * rows, (number + 1) * rows)
            dense.append((found if block is None else transformed(found, block)).to(self.dtype))
        joined = torch.cat(dense)
        joined = joined if self.order is None else joined[self.order]
        return joined.T if self.transposed else joined

    def forward(self) -> Tensor:
        """All matrices."""
        return torch.stack([self.expert(number) for number in range(self.experts)])


class _Experts:
    """A stack in place of a parameter: an index decodes one matrix; anything else that a tensor can do, all of them."""

    def __init__(self, stack: JoinedStack) -> None:
        self._stack = stack

    def __getitem__(self, index: Any) -> Tensor:
        single = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0)
        return self._stack.expert(int(index)) if single else self._stack()[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stack(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [each._stack() if isinstance(each, cls) else each for each in args]
        named = {key: each._stack() if isinstance(each, cls) else each for key, each in (kwargs or {}).items()}
        return function(*plain, **named)


class _Linear(nn.Linear):
    clustered: JoinedWeight

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # for code that asks a layer for its device, dtype or shape
        return self.clustered()

    def forward(self, x: Tensor) -> Tensor:
        y = self.clustered.product(x)
        return y if self.bias is None else y + self.bias


class _Embedding(nn.Embedding):
    clustered: JoinedWeight

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.clustered()

    def forward(self, ids: Tensor) -> Tensor:
        # Each row is decoded once: a text repeats its tokens, and in training their gradients add up in the table.
        unique, place = torch.unique(ids, return_inverse=True)
        return nn.functional.embedding(place, self.clustered.gather(unique))


def make_clustered(layer: nn.Linear | nn.Embedding, weight: JoinedWeight) -> None:
    """Give the layer this weight in place of its own. It keeps its class's forward, its bias and its hooks."""
    del layer._parameters["weight"]
    layer.__class__ = _clustered_class(type(layer))  # type: ignore[assignment, arg-type]
    layer.add_module("clustered", weight)


def tie(layer: nn.Linear, source: nn.Embedding) -> None:
    """Let the layer use the weight of a clustered layer; a state dict holds it once, as the source's."""
    layer._parameters.pop("weight", None)
    layer.__class__ = _clustered_class(type(layer))  # type: ignore[assignment, arg-type]
    layer.__dict__["clustered"] = source.clustered  # past nn.Module, which would register it a second time


def make_stack_clustered(module: nn.Module, parameter: str, stack: JoinedStack) -> None:
    """Give the module this stack in place of a parameter."""
    del module._parameters[parameter]
    module.add_module(f"clustered_{parameter}", stack)
    module.__class__ = _with_experts(type(module), parameter)  # type: ignore[arg-type]


@cache
def _with_experts(own: Any, parameter: str) -> type[nn.Module]:
    found = property(lambda module: _Experts(getattr(module, f"clustered_{parameter}")))
    return type(own.__name__, (own,), {parameter: found})


@cache
def _clustered_class(own: Any) -> type[nn.Module]:
    base = _Linear if issubclass(own, nn.Linear) else _Embedding
    return base if own in (nn.Linear, nn.Embedding) else type(f"Clustered{own.__name__}", (own, base), {})
