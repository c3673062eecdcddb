"""The training loop: Adam on the values of all matrices, towards the reference's distribution after every token.

Loss: KL divergence from the reference to the model, over the whole vocabulary, in nats per token (Hinton et al., arXiv
1503.02531, at temperature 1). The reference's logits are recomputed from its last hidden states, which take `hidden`
numbers per token instead of `vocab`. Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from time import monotonic

import torch
from torch import Tensor, nn
from torch.nn import functional

from rkf.runtime.torch_model import Decoder
from rkf.tune.live import LiveValues

SEQUENCES_A_STEP = 2
SEQUENCES_A_PASS = 1  # a pass decodes every matrix twice and holds its logits: 100 MB for 512 tokens
WARM_UP_STEPS = 5
STEPS_A_CHECK = 8
PATIENCE = 4  # checks without an improvement before the loop stops
_LAST_RATE = 0.05  # the rate falls to this share of its start over the given time

AfterStep = Callable[["Learner", float], None]  # receives the seconds spent so far


@dataclass(frozen=True, slots=True)
class Lesson:
    """ids: i64[n, tokens]; hidden: f32[n, tokens, hidden], the reference's; head: computes its logits."""

    ids: Tensor
    hidden: Tensor
    head: nn.Module

    def split(self, held_out: int) -> tuple[Lesson, Lesson]:
        """The training sequences, and `held_out` sequences spread evenly among all."""
        apart = torch.zeros(len(self.ids), dtype=torch.bool)
        apart[[(2 * i + 1) * len(self.ids) // (2 * held_out) for i in range(held_out)]] = True
        learned, held = (Lesson(self.ids[part], self.hidden[part], self.head) for part in (~apart, apart))
        return learned, held

    def order(self, turn: int) -> list[int]:
        """All sequences in the order of one epoch; it separates neighbours, which may be texts of one kind."""
        shuffled: list[int] = torch.randperm(len(self.ids), generator=torch.Generator().manual_seed(turn)).tolist()
        return shuffled


class Learner:
    """The state of training, all that a resumed run needs. Call `begin` on a new one."""

    def __init__(self, decoder: Decoder, live: Mapping[str, LiveValues], lesson: Lesson, held_out: Lesson) -> None:
        self._decoder, self._live, self._lesson, self._held_out = decoder, live, lesson, held_out
        self.optimizer = torch.optim.Adam(
            [group for item in live.values() for group in item.groups()], betas=(0.9, 0.95)
        )
        self.step, self.stale = 0, 0
        self.before = self.best = nan
        self.best_values: list[Tensor] = []

    def begin(self) -> None:
        """Measure the divergence before training; a resumed run knows it already."""
        self.before = self.best = self.divergence()
        self.best_values = self._values()

    @property
    def recovered(self) -> float:
        """The recovered share of the divergence on held-out text."""
        return 1 - self.best / self.before

    @torch.no_grad()
    def divergence(self) -> float:
        """KL on the held-out text, nats per token."""
        held = self._held_out
        total = sum(float(_divergence(self._decoder, held, part)) * len(part) for part in _passes(range(len(held.ids))))
        return total / len(held.ids)

    def learn(self, seconds: float, spent: float, after_step: AfterStep) -> None:
        """Train until the time is over or held-out text stops improving; the best values are in place afterwards."""
        began = monotonic() - spent
        while (spent := monotonic() - began) < seconds and self.stale < PATIENCE:
            self._learn_step(spent / seconds)
            if self.step % STEPS_A_CHECK == 0:
                self._check()
            after_step(self, monotonic() - began)
        if self.step % STEPS_A_CHECK:
            self._check()
        for parameter, value in zip(self.parameters(), self.best_values, strict=True):
            parameter.data.copy_(value)

    def parameters(self) -> list[nn.Parameter]:
        return [value for item in self._live.values() for value in item.learned]

    def _learn_step(self, share: float) -> None:
        self.optimizer.zero_grad()
        numbers = range(self.step * SEQUENCES_A_STEP, (self.step + 1) * SEQUENCES_A_STEP)
        turns = [divmod(number, len(self._lesson.ids)) for number in numbers]
        for part in _passes([self._lesson.order(turn)[place] for turn, place in turns]):
            (_divergence(self._decoder, self._lesson, part) * (len(part) / SEQUENCES_A_STEP)).backward()
        speed = min((self.step + 1) / WARM_UP_STEPS, 1) * max(1 - share, _LAST_RATE)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * speed
        self.optimizer.step()
        for item in self._live.values():
            item.restore_order()
        self.step += 1

    def _check(self) -> None:
        found = self.divergence()
        self.stale += 1
        if found < self.best:
            self.best, self.best_values, self.stale = found, self._values(), 0

    def _values(self) -> list[Tensor]:
        return [value.detach().clone() for value in self.parameters()]


def _passes(numbers: Sequence[int]) -> list[list[int]]:
    """Sequences in groups that are computed together."""
    return [list(numbers[i : i + SEQUENCES_A_PASS]) for i in range(0, len(numbers), SEQUENCES_A_PASS)]


def _divergence(decoder: Decoder, lesson: Lesson, numbers: list[int]) -> Tensor:
    """KL(reference || model), averaged over the tokens of some sequences."""
    with torch.no_grad():
        wanted = lesson.head(lesson.hidden[numbers].flatten(0, 1)).float().log_softmax(-1)
    found = decoder.head(decoder(lesson.ids[numbers]).flatten(0, 1)).float().log_softmax(-1)
    return functional.kl_div(found, wanted, reduction="sum", log_target=True) / len(wanted)


@torch.no_grad()
def hidden_states(decoder: Decoder, ids: Tensor, progress: Callable[[int, int], None]) -> Tensor:
    """The last hidden states of every token, `f32[n, tokens, hidden]`."""
    found = []
    for part in _passes(range(len(ids))):
        found.append(decoder(ids[part]).float())
        progress(part[-1] + 1, len(ids))
    return torch.cat(found)
