"""The op Delta as a torch module (rkf/model/ops.py says what it computes). Knows no files.

Within a chunk of tokens, the rule is a triangular system (Yang et al., arXiv 2406.06484 and 2412.06464).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rkf.model.ops import Delta
from rkf.runtime.torch_chunks import by_head, decays, in_chunks
from rkf.runtime.torch_pass import TorchPass
from rkf.runtime.torch_tensors import TorchTensors


class TorchDelta(nn.Module):
    """src: [sequences, tokens, queries, keys and values]; a, b: [sequences, tokens, value_heads]."""

    def __init__(self, op: Delta, tensors: TorchTensors) -> None:
        super().__init__()
        self._op, self._layer = op, tensors.layer or 0
        self.a_log, self.dt_bias = tensors.vector(op.a_log), tensors.vector(op.dt_bias)

    def forward(self, run: TorchPass, src: Tensor, a: Tensor, b: Tensor) -> Tensor:
        op = self._op
        width = op.key_heads * op.key_dim
        q, k, v = src.float().split([width, width, op.value_heads * op.value_dim], dim=-1)
        q, k = (self._normed(by_head(part, op.key_dim)) for part in (q, k))
        q, v = q * op.key_dim**-0.5, by_head(v, op.value_dim)
        log_decay = (-self.a_log.exp() * functional.softplus(a.float() + self.dt_bias)).transpose(1, 2)
        beta = b.float().sigmoid().transpose(1, 2)
        state = run.past.state(self._layer, "delta")
        if state is None:
            state = v.new_zeros(*v.shape[:2], op.key_dim, op.value_dim)
        mixed, state = in_chunks(_chunk, (q, k, v, log_decay, beta), state)
        run.past.keep(self._layer, "delta", state)
        return mixed.transpose(1, 2).flatten(2).to(src.dtype)

    def _normed(self, x: Tensor) -> Tensor:
        """Normalised to length 1, with a copy for every value head: [sequences, value_heads, tokens, key_dim]."""
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
        return x.repeat_interleave(self._op.value_heads // self._op.key_heads, dim=1)


def _chunk(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Some tokens after a state. q, k: [sequences, heads, tokens, key_dim]; v: [..., value_dim]; log_decay, beta:
    [sequences, heads, tokens]; state: [sequences, heads, key_dim, value_dim]. Returns the outputs and the state after.
    """
    (between, since, left), beta = decays(log_decay), beta[..., None]
    # What a token adds to the state depends on what earlier tokens have added: (1 + overlap) added = wanted.
    overlap = (beta * k) @ k.transpose(-1, -2) * between
    wanted = beta * (v - since * (k @ state))
    added = torch.linalg.solve_triangular(overlap, wanted, upper=False, unitriangular=True)
    mixed = since * (q @ state) + (q @ k.transpose(-1, -2) * between) @ added
    return mixed, since[..., -1:, :] * state + (left * k).transpose(-1, -2) @ added
