"""The past of a sequence for its next tokens: keys and values by layer, and recurrent states. Knows no weights.

A layer with its own attention has keys and values, `[sequences, kv_heads, positions, head_dim or value_dim]`; one that
shares reads an earlier layer's. A layer with a recurrent op has a state of fixed size.
"""

from __future__ import annotations

from copy import copy
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rkf.errors import UsageError
from rkf.model.ops import Attention
from rkf.model.program import Program
from rkf.model.recurrent_ops import Recurrent
from rkf.runtime.held_bytes import HeldBytes
from rkf.runtime.rope_choice import RopeChoice
from rkf.runtime.snapshots import Snapshots

KeysValues = tuple[Tensor, Tensor]
States = dict[
    tuple[int, str], Tensor
]  # by layer and op; a tensor is never changed, so a copy of the dict is a snapshot
_FIRST_ROOM = 256  # positions allocated first


class Past(Protocol):
    """The past as a pass sees it."""

    @property
    def rope_positions(self) -> int:
        """The length of the text, by which ropes choose their frequencies."""
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
        self.rope_positions, self._device = tokens, device
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
    """The past of a batch of sequences of one length, which may grow to `capacity` positions. memory: counts its bytes.

    slots: layer -> its keys and values, with room for `room` positions; a new object after each reallocation, and when
    ropes change. rope_positions: by which ropes choose their frequencies; the capacity, until `tokens_again` is called.
    """

    def __init__(
        self,
        program: Program,
        sequences: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        memory: HeldBytes,
    ) -> None:
        self._memory = memory
        self.length, self.capacity, self.device = 0, capacity, device
        self.rope_positions, self._rope_choice = capacity, RopeChoice(program.ropes)
        own = {layer: op for layer in range(program.layers) if (op := program.cache_of(layer)) is not None}
        self.slots = {layer: _empty(op, sequences, dtype, device) for layer, op in own.items()}
        sizes = (op.kv_heads * (op.head_dim + op.value_dim) for op in own.values())
        self._position_bytes = sequences * sum(sizes) * dtype.itemsize
        self.room = 0
        self._states: States = {}
        self._next_states: States = {}  # kept apart until all layers are done: a pass may fail
        self._snapshots: Snapshots[States] = Snapshots()
        self.rewinds = not is_recurrent(program)  # whether it can go back to every length, without a mark

    @property
    def takes_back(self) -> bool:
        """Whether it can take back tokens of the last call, as it can all others."""
        return self.rewinds

    def mark(self) -> None:
        """Let `truncate` go back to the present length later. The last marks count (snapshots.py)."""
        if self.length and not self.rewinds:
            self._snapshots.keep(self.length, self._states.copy, marked=True)

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens`. Raises UsageError for a length that it cannot go back to."""
        if not 0 <= tokens <= self.length or self.reusable(tokens) != tokens:
            raise UsageError(f"cache: cannot keep {tokens} of {self.length} tokens")
        if not self.rewinds and tokens < self.length:
            self._states = self._snapshots.of(tokens).copy() if tokens else {}
        self._snapshots.cut(tokens)
        self.length = tokens

    def reusable(self, tokens: int) -> int:
        """The longest beginning of at most `tokens` to which `truncate` can go back."""
        if self.rewinds or tokens >= self.length:
            return min(tokens, self.length)
        return self._snapshots.longest(tokens)

    def fork(self) -> TorchCache:
        """Another cache with the same tokens, in memory of its own."""
        other = copy(self)
        other._rope_choice = self._rope_choice.copy()
        other.slots = {layer: (keys.clone(), values.clone()) for layer, (keys, values) in self.slots.items()}
        for store in (each for both in other.slots.values() for each in both):
            self._memory.count(store)
        other._states, other._next_states, other._snapshots = self._states.copy(), {}, self._snapshots.copy()
        return other

    def growth_bytes(self, tokens: int) -> int:
        """The memory that so many more tokens take: none, or that of the room that is then allocated."""
        return (self._room_for(self.length + tokens) - self.room) * self._position_bytes

    def tokens_again(self, new: NDArray[np.int64]) -> NDArray[np.int64]:
        """The held tokens if `new` ones take other rope frequencies; the cache is then empty. Usually none."""
        number, again = self._rope_choice.number, self._rope_choice.again(self.length, new)
        self.rope_positions = self._rope_choice.positions
        if self._rope_choice.number != number:
            self.truncate(0)
            self.slots = dict(self.slots)
        return again

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
        self._memory.count(state)

    def advance(self, tokens: int) -> None:
        self._states |= self._next_states
        self.length += tokens
        if not self.rewinds and self._snapshots.due(self.length):
            self._snapshots.keep(self.length, self._states.copy)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens`, or double the old room, so that each position is copied only a few times in all."""
        if tokens <= self.room:
            return
        self.room = self._room_for(tokens)
        self.slots = {layer: (self._moved(keys), self._moved(values)) for layer, (keys, values) in self.slots.items()}

    def _moved(self, old: Tensor) -> Tensor:
        # Zeros: masked positions are multiplied by 0, and 0 times uninitialised memory may be NaN.
        new = old.new_zeros((*old.shape[:2], self.room, old.shape[3]))
        new[:, :, : self.length] = old[:, :, : self.length]
        self._memory.count(new)
        return new

    def _room_for(self, tokens: int) -> int:
        """The positions that are allocated once there are so many tokens."""
        grown = min(max(2 * self.room, tokens, _FIRST_ROOM), max(self.capacity, tokens))
        return self.room if tokens <= self.room else grown


def is_recurrent(program: Program) -> bool:
    """Whether a sequence has a state that cannot be cut back."""
    return any(isinstance(op, Recurrent) for kind in program.kinds for op in kind)


def _empty(op: Attention, sequences: int, dtype: torch.dtype, device: torch.device) -> KeysValues:
    keys, values = (
        torch.empty((sequences, op.kv_heads, 0, size), dtype=dtype, device=device)
        for size in (op.head_dim, op.value_dim)
    )
    return keys, values
