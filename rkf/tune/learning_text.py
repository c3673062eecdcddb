"""The text to learn on: written by the reference itself, or read from a file. Knows no loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rkf.errors import UsageError
from rkf.runtime.torch_model import Decoder

Progress = Callable[[int, int], None]
_BATCH = 64  # sequences written at once: a token then costs no more than in a pass over given text


@torch.no_grad()
def written(
    decoder: Decoder, prompts: Sequence[Sequence[int]], sequences: int, tokens: int, seed: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """What the model writes at temperature 1 after each prompt in turn, prompts included: `i64[sequences, tokens]`,
    and its last hidden states on the way, `f32[sequences, tokens, hidden]`.
    """
    random = torch.Generator(decoder.device).manual_seed(seed)
    beginnings = [prompts[i % len(prompts)][:tokens] for i in range(sequences)]
    batches = [beginnings[i : i + _BATCH] for i in range(0, sequences, _BATCH)]
    parts = []
    for number, batch in enumerate(batches):

        def advance(n: int, done: int = number * tokens) -> None:
            progress(done + n, len(batches) * tokens)

        parts.append(_continued(decoder, batch, tokens, random, advance))
    ids, hidden = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(hidden)


def _continued(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    random: torch.Generator,
    progress: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(prompts), tokens), -1)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    ids = ids.to(decoder.device)
    hidden = torch.empty(len(prompts), tokens, decoder.width, device=decoder.device)
    cache = decoder.new_cache(len(prompts), tokens)
    for t in range(tokens):
        states = decoder(ids[:, t : t + 1], cache)[:, 0]
        hidden[:, t] = states
        if t + 1 < tokens:
            given = ids[:, t + 1]
            ids[:, t + 1] = torch.where(given < 0, _drawn(decoder.head(states), random), given)
        progress(t + 1)
    return ids, hidden


def _drawn(logits: Tensor, random: torch.Generator) -> Tensor:
    """A token of each row, by the point of [0, 1) that falls into its share: a third of torch.multinomial's time."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    points = torch.rand(len(logits), 1, dtype=torch.float64, generator=random, device=logits.device)
    return torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def cut(ids: Sequence[int], sequences: int, tokens: int) -> Tensor:
    """Up to `sequences` pieces of a text, spread over it evenly: `i64[n, tokens]`. UsageError if it gives under two."""
    available = len(ids) // tokens
    if available < 2:
        raise UsageError(f"the text has {len(ids)} tokens: expected at least {2 * tokens} to learn on")
    chosen = min(sequences, available)
    pieces = torch.tensor(ids[: available * tokens]).view(available, tokens)
    return pieces[[i * available // chosen for i in range(chosen)]]
