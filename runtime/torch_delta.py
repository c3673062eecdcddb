"""The op Delta as a torch module (rkf/model/ops.py says what it computes). Knows no files.

Tokens are processed in chunks. Within a chunk the rule is a triangular system (Yang et al., arXiv 2406.06484 and
2412.06464); the state passes from chunk to chunk. Everything is f32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rkf.model.ops import Delta
from rkf.runtime.torch_pass import TorchPass
from rkf.runtime.torch_tensors import TorchTensors

_CHUNK = 64  # tokens; the value in the papers' reference code


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
        q, k = (self._normed(_by_head(part, op.key_dim)) for part in (q, k))
        q, v = q * op.key_dim**-0.5, _by_head(v, op.value_dim)
        log_decay = (-self.a_log.exp() * functional.softplus(a.float() + self.dt_bias)).transpose(1, 2)
        beta = b.float().sigmoid().transpose(1, 2)
        state = run.past.state(self._layer, "delta")
        if state is None:
            state = v.new_zeros(*v.shape[:2], op.key_dim, op.value_dim)
        found = []
        for start in range(0, q.shape[2], _CHUNK):
            some = slice(start, start + _CHUNK)
            parts = q[:, :, some], k[:, :, some], v[:, :, some], log_decay[:, :, some], beta[:, :, some]
            mixed, state = _chunk(*parts, state)
            found.append(mixed)
        run.past.keep(self._layer, "delta", state)
        return torch.cat(found, dim=2).transpose(1, 2).flatten(2).to(src.dtype)

    def _normed(self, x: Tensor) -> Tensor:
        """Normalised to length 1, with a copy for every value head: [sequences, value_heads, tokens, key_dim]."""
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
        return x.repeat_interleave(self._op.value_heads // self._op.key_heads, dim=1)


def _chunk(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Some tokens after a state. q, k: [sequences, heads, tokens, key_dim]; v: [..., value_dim]; log_decay, beta:
    [sequences, heads, tokens]; state: [sequences, heads, key_dim, value_dim]. Returns the outputs and the state after.
    """
    tokens = q.shape[2]
    since = log_decay.cumsum(-1)  # decay of the state up to and including each token
    lower = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
    between = (since[..., :, None] - since[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    grown, beta = since.exp()[..., None], beta[..., None]
    # What a token adds to the state depends on what earlier tokens have added: (1 + overlap) added = wanted.
    overlap = (beta * k) @ k.transpose(-1, -2) * between
    wanted = beta * (v - grown * (k @ state))
    added = torch.linalg.solve_triangular(overlap, wanted, upper=False, unitriangular=True)
    mixed = grown * (q @ state) + (q @ k.transpose(-1, -2) * between) @ added
    left = (since[..., -1:] - since).exp()[..., None]
    return mixed, grown[..., -1:, :] * state + (left * k).transpose(-1, -2) @ added


def _by_head(x: Tensor, size: int) -> Tensor:
    """[sequences, tokens, heads * size] -> [sequences, heads, tokens, size]."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)
