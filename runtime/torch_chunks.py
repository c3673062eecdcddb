"""Recurrent ops whose state decays, over chunks of tokens: the pieces that they share. Everything is f32."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 64  # tokens; the value in the reference code of the delta rule
Chunk = Callable[..., tuple[Tensor, Tensor]]


class Decays(NamedTuple):
    """What is left within a chunk: at token t of what token s adds (between: [..., t, s], 0 before s), at each token of
    the state before it (since: [..., tokens, 1]), at its end of what each token adds (left: [..., tokens, 1]).
    """

    between: Tensor
    since: Tensor
    left: Tensor


def decays(log_decay: Tensor) -> Decays:
    """log_decay: [..., tokens]. Sums are f64: those of a chunk may reach 1000 where two tokens differ by 0.01."""
    total = log_decay.double().cumsum(-1)
    tokens = total.shape[-1]
    lower = torch.ones(tokens, tokens, dtype=torch.bool, device=total.device).tril()
    between = (total[..., :, None] - total[..., None, :]).float().masked_fill(~lower, -torch.inf).exp()
    return Decays(between, total.float().exp()[..., None], (total[..., -1:] - total).float().exp()[..., None])


def in_chunks(chunk: Chunk, parts: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    """chunk(*parts of some tokens, state) -> (output, state after), over all tokens: axis 2 of every part."""
    found = []
    for start in range(0, parts[0].shape[2], _CHUNK):
        mixed, state = chunk(*(part[:, :, start : start + _CHUNK] for part in parts), state)
        found.append(mixed)
    return torch.cat(found, dim=2), state


def by_head(x: Tensor, size: int) -> Tensor:
    """[sequences, tokens, heads * size] -> [sequences, heads, tokens, size]."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)
