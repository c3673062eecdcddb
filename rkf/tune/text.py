"""The text to learn on: sampled from the reference itself, or read from a file. Knows no loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rkf.errors import UsageError
from rkf.runtime.torch_model import Decoder, TorchCache

Progress = Callable[[int, int], None]


@torch.no_grad()
def sampled(decoder: Decoder, sequences: int, tokens: int, seed: int, progress: Progress) -> Tensor:
    """What the model writes of itself at temperature 1, from BOS on: `i64[sequences, tokens]`, all in one batch."""
    device = decoder.norm.weight.device
    start = decoder.config.bos_id if decoder.config.bos_id is not None else 0
    ids = torch.full((sequences, tokens), start, device=device)
    cache = TorchCache(decoder.config, sequences, tokens, decoder.norm.weight)
    random = torch.Generator(device).manual_seed(seed)
    for done in range(1, tokens):
        logits = decoder.head(decoder(ids[:, done - 1 : done], cache)[:, -1])
        ids[:, done] = torch.multinomial(logits.float().softmax(-1), 1, generator=random)[:, 0]
        progress(done + 1, tokens)
    return ids


def cut(ids: Sequence[int], sequences: int, tokens: int) -> Tensor:
    """Up to `sequences` pieces of a text, spread over it evenly: `i64[n, tokens]`. UsageError if it gives under two."""
    available = len(ids) // tokens
    if available < 2:
        raise UsageError(f"the text has {len(ids)} tokens: expected at least {2 * tokens} to learn on")
    chosen = min(sequences, available)
    pieces = torch.tensor(ids[: available * tokens]).view(available, tokens)
    return pieces[[i * available // chosen for i in range(chosen)]]
