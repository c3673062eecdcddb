"""The op Scan as a torch module (rkf/model/ops.py says what it computes). Knows no files.

Within a chunk, the recurrence is attention whose weights decay (Dao and Gu, arXiv 2405.21060, section 6).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from rkf.model.ops import Scan
from rkf.runtime.torch_chunks import by_head, decays, in_chunks
from rkf.runtime.torch_pass import TorchPass
from rkf.runtime.torch_tensors import TorchTensors


class TorchScan(nn.Module):
    """src: [sequences, tokens, x, B and C]; dt: [sequences, tokens, heads]."""

    def __init__(self, op: Scan, tensors: TorchTensors) -> None:
        super().__init__()
        self._op, self._layer = op, tensors.layer or 0
        self.a_log, self.dt_bias, self.d = (tensors.vector(name) for name in (op.a_log, op.dt_bias, op.d))

    def forward(self, run: TorchPass, src: Tensor, dt: Tensor) -> Tensor:
        op = self._op
        shared = op.groups * op.state_dim
        x, b, c = src.float().split([op.heads * op.head_dim, shared, shared], dim=-1)
        x = by_head(x, op.head_dim)
        b, c = (by_head(part, op.state_dim).repeat_interleave(op.heads // op.groups, dim=1) for part in (b, c))
        steps = functional.softplus(dt.float() + self.dt_bias).clamp(op.dt_min, op.dt_max).transpose(1, 2)
        log_decay = -self.a_log.exp()[:, None] * steps
        state = run.past.state(self._layer, "scan")
        if state is None:
            state = x.new_zeros(*x.shape[:2], op.state_dim, op.head_dim)
        mixed, state = in_chunks(_chunk, (c, b, steps[..., None] * x, log_decay), state)
        run.past.keep(self._layer, "scan", state)
        mixed = mixed + self.d[:, None, None] * x
        return mixed.transpose(1, 2).flatten(2).to(src.dtype)


def _chunk(c: Tensor, b: Tensor, entering: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Some tokens after a state. c, b: [sequences, heads, tokens, state_dim]; entering: [..., head_dim]; log_decay:
    [sequences, heads, tokens]; state: [sequences, heads, state_dim, head_dim]. Returns the outputs and the state after.
    """
    between, since, left = decays(log_decay)
    mixed = since * (c @ state) + (c @ b.transpose(-1, -2) * between) @ entering
    return mixed, since[..., -1:, :] * state + (left * b).transpose(-1, -2) @ entering
