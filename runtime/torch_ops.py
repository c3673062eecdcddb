"""The ops of a program as torch modules, one per class (rkf/model/ops.py says what each computes). Knows no files.

A module is made from its op and the tensors of its layer. It is called with the pass and the values that the op reads,
`[sequences, tokens, width]` each, and returns the value that it writes. Norms, rope, routing, softmax and Hadamard
transforms compute in f32 for values of any dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from rkf.model import ops
from rkf.model.op import Op
from rkf.runtime import torch_parallel
from rkf.runtime.parallel_program import Gathered, SplitEmbed, SplitLogits, Summed
from rkf.runtime.torch_attention import TorchAttention
from rkf.runtime.torch_delta import TorchDelta
from rkf.runtime.torch_experts import TorchExperts, TorchRoute
from rkf.runtime.torch_gate import gated, xielu
from rkf.runtime.torch_pass import TorchPass
from rkf.runtime.torch_scan import TorchScan
from rkf.runtime.torch_tensors import TorchTensors
from rkf.torch.hadamard_torch import transformed


class _Embed(nn.Module):
    def __init__(self, op: ops.Embed, tensors: TorchTensors) -> None:
        super().__init__()
        self.table = tensors.embedding(op.table)
        self._scale, self._dtype = op.scale, tensors.dtype

    def forward(self, run: TorchPass) -> Tensor:
        rows: Tensor = self.table(run.ids).to(self._dtype)
        return rows if self._scale == 1 else rows * self._scale


class _SplitEmbed(_Embed):
    def __init__(self, op: SplitEmbed, tensors: TorchTensors) -> None:
        super().__init__(op, tensors)
        self._rows = op.rows

    def forward(self, run: TorchPass) -> Tensor:
        rows = torch_parallel.own_rows(run.ids, self.table, self._rows).to(self._dtype)
        return rows if self._scale == 1 else rows * self._scale


class _Gathered(nn.Module):
    def __init__(self, op: Gathered, tensors: TorchTensors) -> None:
        super().__init__()

    def forward(self, run: TorchPass, src: Tensor) -> Tensor:
        return torch_parallel.gathered(src)


class _Summed(nn.Module):
    def __init__(self, op: Summed, tensors: TorchTensors) -> None:
        super().__init__()

    def forward(self, run: TorchPass, src: Tensor) -> Tensor:
        return torch_parallel.summed(src)


class _Norm(nn.Module):
    def __init__(self, op: ops.Norm, tensors: TorchTensors) -> None:
        super().__init__()
        self.weight, self.bias = tensors.optional(op.weight), tensors.optional(op.bias)
        if self.weight is not None and op.offset:
            self.weight.add_(op.offset)
        self._group, self._epsilon, self._centred, self._by_group = op.group, op.epsilon, op.centred, op.by_group

    def forward(self, run: TorchPass, src: Tensor) -> Tensor:
        size = self._group or src.shape[-1]
        x = src.float().unflatten(-1, (-1, size))
        weight, bias = (None, None) if self._by_group else (self.weight, self.bias)
        if self._centred:
            x = functional.layer_norm(x, (size,), weight, bias, self._epsilon)
        else:
            x = functional.rms_norm(x, (size,), weight, self._epsilon)
            x = x if bias is None else x + bias
        x = x.flatten(-2)
        if self._by_group:
            x = x if self.weight is None else x * self.weight
            x = x if self.bias is None else x + self.bias
        return x.to(src.dtype)


class _Linear(nn.Module):
    def __init__(self, op: ops.Linear, tensors: TorchTensors) -> None:
        super().__init__()
        self.matrix = tensors.linear(op.weight, op.bias)

    def forward(self, run: TorchPass, src: Tensor) -> Tensor:
        product: Tensor = self.matrix(src)
        return product


class _LinearInParts(nn.Module):
    def __init__(self, op: ops.Linear, tensors: TorchTensors) -> None:
        super().__init__()
        self.matrices, self.bias = tensors.stack(op.weight), tensors.optional(op.bias, tensors.dtype)
        self._parts = op.parts or 1

    def forward(self, run: TorchPass, src: Tensor) -> Tensor:
        parts = enumerate(src.chunk(self._parts, dim=-1))
        product = torch.cat([self.matrices(part, number) for number, part in parts], dim=-1)
        return product if self.bias is None else product + self.bias


class _Rope(nn.Module):
    def __init__(self, op: ops.Rope, tensors: TorchTensors) -> None:
        super().__init__()
        self._table, self._head_dim, self._neighbours = op.table, op.head_dim, op.pairs == "neighbours"

    def forward(self, run: TorchPass, src: Tensor) -> Tensor:
        cosine, sine = (part[:, None, :] for part in run.angles(self._table))  # the same for all heads
        x = src.unflatten(-1, (-1, self._head_dim))
        pairs = cosine.shape[-1]
        turned, rest = x[..., : 2 * pairs].float(), x[..., 2 * pairs :]
        if self._neighbours:
            a, b = turned.unflatten(-1, (pairs, 2)).unbind(-1)
        else:
            a, b = turned.chunk(2, dim=-1)
        both = a * cosine - b * sine, b * cosine + a * sine
        turned = torch.stack(both, dim=-1).flatten(-2) if self._neighbours else torch.cat(both, dim=-1)
        return torch.cat([turned.to(src.dtype), rest], dim=-1).flatten(-2)


class _Gate(nn.Module):
    def __init__(self, op: ops.Gate, tensors: TorchTensors) -> None:
        super().__init__()
        self._op, self._layer = op, tensors.layer

    def forward(self, run: TorchPass, a: Tensor, b: Tensor | None = None) -> Tensor:
        op = self._op
        if op.by_layer and b is not None and self._layer is not None:
            b = b[..., self._layer * a.shape[-1] :][..., : a.shape[-1]]
        return gated(a, b, op.act, op.limit, op.alpha, op.shift)


class _Xielu(nn.Module):
    def __init__(self, op: ops.Gate, tensors: TorchTensors) -> None:
        super().__init__()
        self._limit = op.limit
        self.alpha_p, self.alpha_n, self.beta, self.eps = map(tensors.vector, op.tensor_names())

    def forward(self, run: TorchPass, a: Tensor) -> Tensor:
        a = a if self._limit is None else a.clamp(max=self._limit)
        return xielu(a, self.alpha_p, self.alpha_n, self.beta, self.eps)


class _Concat(nn.Module):
    def __init__(self, op: ops.Concat, tensors: TorchTensors) -> None:
        super().__init__()
        self._heads = op.heads

    def forward(self, run: TorchPass, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([each.unflatten(-1, (self._heads, -1)) for each in (a, b)], dim=-1).flatten(-2)


class _Add(nn.Module):
    def __init__(self, op: ops.Add, tensors: TorchTensors) -> None:
        super().__init__()
        self._scale = op.scale

    def forward(self, run: TorchPass, a: Tensor, b: Tensor) -> Tensor:
        return a + b if self._scale == 1 else a + b * self._scale


class _Scale(nn.Module):
    def __init__(self, op: ops.Scale, tensors: TorchTensors) -> None:
        super().__init__()
        self._factor = op.factor
        self.weight = tensors.optional(op.weight, tensors.dtype)

    def forward(self, run: TorchPass, src: Tensor) -> Tensor:
        x = src if self._factor == 1 else src * self._factor
        return x if self.weight is None else x * self.weight


class _Conv(nn.Module):
    def __init__(self, op: ops.Conv, tensors: TorchTensors) -> None:
        super().__init__()
        self.weight, self.bias = tensors.vector(op.weight), tensors.optional(op.bias)
        self._before, self._act, self._layer = op.taps - 1, op.act, tensors.layer or 0

    def forward(self, run: TorchPass, src: Tensor) -> Tensor:
        x = src.float().transpose(1, 2)
        state = run.past.state(self._layer, "conv")
        x = torch.cat([x.new_zeros(*x.shape[:2], self._before) if state is None else state, x], dim=-1)
        run.past.keep(self._layer, "conv", x[..., x.shape[-1] - self._before :].clone())
        mixed = functional.conv1d(x, self.weight[:, None, :], self.bias, groups=len(self.weight))
        return gated(mixed, None, self._act).transpose(1, 2).to(src.dtype)


class _Clip(nn.Module):
    def __init__(self, op: ops.Clip, tensors: TorchTensors) -> None:
        super().__init__()
        self._limit = op.limit

    def forward(self, run: TorchPass, src: Tensor) -> Tensor:
        return src.clamp(-self._limit, self._limit)


class _Hadamard(nn.Module):
    def __init__(self, op: ops.Hadamard, tensors: TorchTensors) -> None:
        super().__init__()
        self._block = op.block

    def forward(self, run: TorchPass, src: Tensor) -> Tensor:
        return transformed(src, self._block)


class TorchHead(nn.Module):
    """The last op of a program: hidden: [..., width] -> logits: [..., vocab]. It needs no pass."""

    def __init__(self, op: ops.Logits, tensors: TorchTensors) -> None:
        super().__init__()
        self.matrix = tensors.linear(op.weight, op.bias)
        self._scale, self._softcap = op.scale, op.softcap
        self._is_part = isinstance(op, SplitLogits)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.matrix(hidden)
        logits = torch_parallel.gathered(logits) if self._is_part else logits
        logits = logits if self._scale == 1 else logits * self._scale
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)


_MODULES: Mapping[type[Op], Callable[..., nn.Module]] = {
    ops.Embed: _Embed,
    ops.Norm: _Norm,
    ops.Linear: lambda op, tensors: (_Linear if op.parts is None else _LinearInParts)(op, tensors),
    ops.Rope: _Rope,
    ops.Attention: TorchAttention,
    ops.Gate: lambda op, tensors: (_Xielu if op.act == "xielu" else _Gate)(op, tensors),
    ops.Route: TorchRoute,
    ops.Experts: TorchExperts,
    ops.Add: _Add,
    ops.Concat: _Concat,
    ops.Scale: _Scale,
    ops.Conv: _Conv,
    ops.Delta: TorchDelta,
    ops.Scan: TorchScan,
    ops.Clip: _Clip,
    ops.Hadamard: _Hadamard,
    SplitEmbed: _SplitEmbed,
    Gathered: _Gathered,
    Summed: _Summed,
}


class TorchOps(nn.Module):
    """A sequence of ops that reads and writes `values`, by name."""

    def __init__(self, found: tuple[Op, ...], tensors: TorchTensors) -> None:
        super().__init__()
        self.steps = nn.ModuleList(_MODULES[type(op)](op, tensors) for op in found)
        self._names = [(op.dst, op.reads()) for op in found]

    def forward(self, run: TorchPass, values: dict[str, Tensor]) -> None:
        for step, (written, read) in zip(self.steps, self._names, strict=True):
            values[written] = step(run, *(values[name] for name in read))
