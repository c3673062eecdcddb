"""The op Attention as a torch module (rkf/model/ops.py says what it computes). Knows no files.

Uses torch's fused attention where possible, and explicit scores where they are capped or have sinks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rkf.model.ops import Attention
from rkf.runtime.torch_pass import TorchPass
from rkf.runtime.torch_tensors import TorchTensors

# Scores held at a time, 256 MB of f32. 512 tokens of 64 heads after 32,768 positions have 1 << 30.
_SCORES = 1 << 26


class TorchAttention(nn.Module):
    """q, k, v: [sequences, tokens, heads * size] -> [sequences, tokens, heads * value_dim]."""

    def __init__(self, op: Attention, tensors: TorchTensors) -> None:
        super().__init__()
        self._op = op
        self._slot = op.shares if op.shares is not None else tensors.layer or 0
        self.sinks = tensors.optional(op.sinks)

    def forward(self, run: TorchPass, q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        op = self._op
        q = _by_head(q, op.head_dim)
        if op.temperature_beta is not None and op.temperature_length is not None:
            grown = ((run.positions + (op.temperature_offset or 0)) // op.temperature_length).float().log1p()
            q = (q * (1 + op.temperature_beta * grown)[:, None]).to(q.dtype)
        if k is None or v is None:
            keys, values = run.past.held(self._slot)
        else:
            keys, values = run.past.extend(self._slot, _by_head(k, op.head_dim), _by_head(v, op.value_dim))
        if op.softcap is not None or self.sinks is not None:
            tokens = max(_SCORES // (q.shape[0] * q.shape[1] * keys.shape[2]), 1)
            parts = zip(q.split(tokens, dim=2), run.mask(op).split(tokens), strict=True)
            mixed = torch.cat([self._explicit(part, keys, values, mask) for part, mask in parts], dim=2)
        else:
            plain = run.is_plain(op)
            mask = None if plain else run.mask(op)
            mixed = functional.scaled_dot_product_attention(
                q, keys, values, mask, is_causal=plain, scale=op.scale, enable_gqa=True
            )
        return mixed.transpose(1, 2).flatten(2)

    def _explicit(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """The same with explicit scores. q: [sequences, heads, tokens, head_dim]."""
        grouped = q.unflatten(1, (self._op.kv_heads, -1))  # [sequences, kv_heads, heads of each, tokens, head_dim]
        scores = (grouped @ keys[:, :, None].transpose(-1, -2)).float() * self._op.scale
        if self._op.softcap is not None:
            scores = self._op.softcap * torch.tanh(scores / self._op.softcap)
        scores = scores.masked_fill(~mask, -torch.inf)
        if self.sinks is not None:
            sinks = self.sinks.view(1, self._op.kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        shares = scores.softmax(-1)[..., : values.shape[2]].to(values.dtype)
        return (shares @ values[:, :, None]).flatten(1, 2)


def _by_head(x: Tensor, size: int) -> Tensor:
    """[sequences, tokens, heads * size] -> [sequences, heads, tokens, size]."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)
