"""The past of a sequence for its next tokens: keys and values by layer, and recurrent states. Knows no weights.

A layer with its own attention has keys and values, `[sequences, kv_heads, positions, head_dim or value_dim]`; one that
shares reads an earlier layer's. A layer with a convolution or a delta rule has a state of fixed size.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rkf.errors import UsageError
from rkf.model.ops import Attention, Conv, Delta
from rkf.model.program import Program

KeysValues = tuple[Tensor, Tensor]
_FIRST_ROOM = 256  # positions allocated first


class Past(Protocol):
    """The past as a pass sees it."""

    @property
    def capacity(self) -> int:
        """The positions that the sequences may grow to; it decides whether long rope tables are used."""
        ...

    def span(self, tokens: int) -> tuple[Tensor, int]:
        """Positions of the next tokens, i64[tokens], and the number of positions in the keys from `extend`."""
        ...

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> KeysValues:
        """Add those of the next tokens, [sequences, kv_heads, tokens, …]; returns all."""
        ...

    def held(self, layer: int) -> KeysValues:
        """All of an earlier layer, including the next tokens."""
        ...

    def state(self, layer: int, name: str) -> Tensor | None:
        """The recurrent state of a layer's op; None at the start of the sequences."""
        ...

    def keep(self, layer: int, name: str, state: Tensor) -> None:
        """Store the state after the next tokens."""
        ...

    def advance(self, tokens: int) -> None:
        """Count the next tokens, once all layers have stored theirs."""
        ...


class NoPast:
    """The past of sequences that begin and end with one pass."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.capacity, self._device = tokens, device
        self._slots: dict[int, KeysValues] = {}

    def span(self, tokens: int) -> tuple[Tensor, int]:
        return torch.arange(tokens, device=self._device), tokens

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> KeysValues:
        self._slots[layer] = keys, values
        return keys, values

    def held(self, layer: int) -> KeysValues:
        return self._slots[layer]

    def state(self, layer: int, name: str) -> Tensor | None:
        return None

    def keep(self, layer: int, name: str, state: Tensor) -> None:
        """Nothing comes after this pass."""

    def advance(self, tokens: int) -> None:
        """Nothing comes after this pass."""


class TorchCache:
    """The past of a batch of sequences of one length, which may grow to `capacity` positions.

    slots: layer -> its keys and values, with room for `room` positions; a new object after each reallocation.
    """

    def __init__(
        self, program: Program, sequences: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.length, self.capacity, self.device = 0, capacity, device
        own = {layer: op for layer in range(program.layers) if (op := program.cache_of(layer)) is not None}
        self.slots = {layer: _empty(op, sequences, dtype, device) for layer, op in own.items()}
        self.room = 0
        self._states: dict[tuple[int, str], Tensor] = {}
        self._next_states: dict[tuple[int, str], Tensor] = {}  # kept apart until all layers are done: a pass may fail

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens`. Recurrent states can only go back to the start."""
        if not 0 <= tokens <= self.length:
            raise UsageError(f"cache: cannot keep {tokens} of {self.length} tokens")
        if self.reusable(tokens) != tokens:
            raise UsageError(f"cache: a recurrent state of {self.length} tokens cannot go back to {tokens}, only to 0")
        if not tokens:
            self._states.clear()
        self.length = tokens

    def reusable(self, tokens: int) -> int:
        """The longest beginning of at most `tokens` to which `truncate` can go back."""
        if self._states and tokens < self.length:
            return 0
        return min(tokens, self.length)

    def span(self, tokens: int) -> tuple[Tensor, int]:
        end = self.length + tokens
        self.reserve(end)
        self._end = end
        return torch.arange(self.length, end, device=self.device), end

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> KeysValues:
        for store, new in zip(self.slots[layer], (keys, values), strict=True):
            store[:, :, self.length : self._end] = new
        return self.held(layer)

    def held(self, layer: int) -> KeysValues:
        keys, values = self.slots[layer]
        return keys[:, :, : self._end], values[:, :, : self._end]

    def state(self, layer: int, name: str) -> Tensor | None:
        return self._states.get((layer, name))

    def keep(self, layer: int, name: str, state: Tensor) -> None:
        self._next_states[layer, name] = state

    def advance(self, tokens: int) -> None:
        self._states |= self._next_states
        self.length += tokens

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens`, or double the old room, so that each position is copied only a few times in all."""
        if tokens <= self.room:
            return
        self.room = min(max(2 * self.room, tokens, _FIRST_ROOM), max(self.capacity, tokens))
        self.slots = {layer: (self._moved(keys), self._moved(values)) for layer, (keys, values) in self.slots.items()}

    def _moved(self, old: Tensor) -> Tensor:
        # Zeros: masked positions are multiplied by 0, and 0 times uninitialised memory may be NaN.
        new = old.new_zeros((*old.shape[:2], self.room, old.shape[3]))
        new[:, :, : self.length] = old[:, :, : self.length]
        return new


def is_recurrent(program: Program) -> bool:
    """Whether a sequence has a state that cannot be cut back."""
    return any(isinstance(op, Conv | Delta) for kind in program.kinds for op in kind)


def _empty(op: Attention, sequences: int, dtype: torch.dtype, device: torch.device) -> KeysValues:
    keys, values = (
        torch.empty((sequences, op.kv_heads, 0, size), dtype=dtype, device=device)
        for size in (op.head_dim, op.value_dim)
    )
    return keys, values
