"""The data that the ops of one pass share: tokens, positions, rope angles, masks and the past. Knows no weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rkf.model.frequencies import Frequencies
from rkf.model.ops import Attention
from rkf.runtime.torch_past import Past


class RopeTables(nn.Module):
    """The frequencies of a program's ropes as buffers, f32[pairs] each, with separate ones for long sequences."""

    def __init__(self, ropes: Sequence[Frequencies]) -> None:
        super().__init__()
        self._ropes = tuple(ropes)
        for number, rope in enumerate(self._ropes):
            self.register_buffer(f"short{number}", torch.tensor(rope.frequencies, dtype=torch.float32))
            if rope.long is not None:
                self.register_buffer(f"long{number}", torch.tensor(rope.long, dtype=torch.float32))

    def angles(self, table: int, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, f32[tokens, pairs], in texts of so many positions."""
        rope = self._ropes[table]
        name = "long" if rope.of(length) is rope.long else "short"
        turned = positions.to(torch.float32)[:, None] * self.get_buffer(f"{name}{table}")
        return turned.cos() * rope.factor, turned.sin() * rope.factor


class TorchPass:
    """ids: i64[sequences, tokens], the next of every sequence. Shared data is computed once for all layers."""

    def __init__(self, ropes: RopeTables, ids: Tensor, past: Past) -> None:
        self.ids, self.past = ids, past
        self.positions, self._end = past.span(ids.shape[1])
        self._ropes = ropes
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int | None, int | None], Tensor] = {}

    def angles(self, table: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the tokens' positions by a rope of the program, f32[tokens, pairs]."""
        if table not in self._angles:
            self._angles[table] = self._ropes.angles(table, self.positions, self.past.rope_positions)
        return self._angles[table]

    def is_plain(self, op: Attention) -> bool:
        """Whether every token sees itself and all earlier tokens of this pass, and no others."""
        tokens = self.ids.shape[1]
        return self._end == tokens and (op.reach is None or tokens <= op.reach)

    def mask(self, op: Attention) -> Tensor:
        """The positions that each token sees, `bool[tokens, positions]`."""
        key = op.window, op.chunk
        if key not in self._masks:
            own, every = self.positions[:, None], torch.arange(self._end, device=self.positions.device)
            seen = every <= own
            if op.window is not None:
                seen &= every > own - op.window
            elif op.chunk is not None:
                seen &= every >= own - own % op.chunk
            self._masks[key] = seen
        return self._masks[key]
