"""Learning: Adam on the values of all matrices, towards the reference's distribution after every token.

Loss: KL divergence from the reference to the model, over the whole vocabulary, in nats a token (Hinton et al., arXiv
1503.02531, at temperature 1). The reference's logits are made anew from its last hidden states, which are `hidden`
numbers a token where logits are `vocab`. Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic

import torch
from torch import Tensor, nn
from torch.nn import functional

from rkf.runtime.torch_model import Decoder
from rkf.tune.live import LiveValues

SEQUENCES_A_STEP = 4
WARM_UP_STEPS = 5
STEPS_A_CHECK = 8
PATIENCE = 4  # checks without a gain
_LAST_RATE = 0.05  # the rate falls to this share of itself at the end of the time

Check = Callable[["Learner", float], None]  # called after each check with the seconds spent so far


@dataclass(frozen=True, slots=True)
class Lesson:
    """ids: i64[n, tokens]; hidden: f32[n, tokens, hidden], the reference's; head: makes its logits."""

    ids: Tensor
    hidden: Tensor
    head: nn.Module

    def split(self, held_out: int) -> tuple[Lesson, Lesson]:
        """All but the last sequences, and those."""
        return (
            Lesson(self.ids[:-held_out], self.hidden[:-held_out], self.head),
            Lesson(self.ids[-held_out:], self.hidden[-held_out:], self.head),
        )


class Learner:
    """The state of learning: everything that a resumed run needs."""

    def __init__(self, decoder: Decoder, live: Mapping[str, LiveValues], lesson: Lesson, held_out: Lesson) -> None:
        self._decoder, self._live, self._lesson, self._held_out = decoder, live, lesson, held_out
        self.optimizer = torch.optim.Adam(
            [group for item in live.values() for group in item.groups()], betas=(0.9, 0.95)
        )
        self.step, self.stale = 0, 0
        self.before = self.best = self.divergence()
        self.best_values = self._values()

    @property
    def recovered(self) -> float:
        """The share of the divergence on held-out text that is gone."""
        return 1 - self.best / self.before

    @torch.no_grad()
    def divergence(self) -> float:
        """KL on the held-out text, nats a token."""
        held = self._held_out
        losses = [float(_divergence(self._decoder, held, i)) for i in range(len(held.ids))]
        return sum(losses) / len(losses)

    def learn(self, seconds: float, spent: float, check: Check) -> None:
        """Learn until the time is over or held-out text gains no more; the best values are in place afterwards."""
        began = monotonic() - spent
        while (spent := monotonic() - began) < seconds and self.stale < PATIENCE:
            self._learn_step(spent / seconds)
            if self.step % STEPS_A_CHECK == 0:
                self._check()
                check(self, monotonic() - began)
        if self.step % STEPS_A_CHECK:
            self._check()
        for parameter, value in zip(self.parameters(), self.best_values, strict=True):
            parameter.data.copy_(value)

    def parameters(self) -> list[nn.Parameter]:
        return [value for item in self._live.values() for value in item.learned]

    def _learn_step(self, share: float) -> None:
        self.optimizer.zero_grad()
        for i in range(SEQUENCES_A_STEP):
            number = (self.step * SEQUENCES_A_STEP + i) % len(self._lesson.ids)
            (_divergence(self._decoder, self._lesson, number) / SEQUENCES_A_STEP).backward()
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


def _divergence(decoder: Decoder, lesson: Lesson, number: int) -> Tensor:
    """KL(reference || model), averaged over the tokens of one sequence."""
    with torch.no_grad():
        wanted = lesson.head(lesson.hidden[number]).float().log_softmax(-1)
    found = decoder.head(decoder(lesson.ids[number : number + 1])[0]).float().log_softmax(-1)
    return functional.kl_div(found, wanted, reduction="sum", log_target=True) / len(wanted)


@torch.no_grad()
def hidden_states(decoder: Decoder, ids: Tensor, progress: Callable[[int, int], None]) -> Tensor:
    """The last hidden states of every token, `f32[n, tokens, hidden]`."""
    found = []
    for number in range(len(ids)):
        found.append(decoder(ids[number : number + 1])[0].float())
        progress(number + 1, len(ids))
    return torch.stack(found)
