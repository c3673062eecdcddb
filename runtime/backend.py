"""What the generation loop, the server and the evaluators ask of an engine. Knows no device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rkf.errors import ContextLengthError, UsageError
from rkf.model.metadata import ModelMetadata

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


class TokenSequence(Protocol):
    """The tokens that a model has read, as what it remembers of them: keys, values, states."""

    @property
    def capacity(self) -> int:
        """The most tokens that it can hold."""
        ...

    @property
    def length(self) -> int:
        """Tokens held."""
        ...

    def truncate(self, tokens: int) -> None:
        """Keep the first `tokens` alone, so that another continuation can follow a common beginning.

        Raises UsageError for a length that it cannot go back to.
        """
        ...

    def reusable(self, tokens: int) -> int:
        """The longest beginning of at most `tokens` that `truncate` can go back to.

        A layer that keeps a state forgets all or nothing, one with a window has given back what lies behind it.
        """
        ...


class Row(NamedTuple):
    """What one sequence is fed: `tokens: i64[n]`, n >= 1, come after those that it holds."""

    sequence: Any
    tokens: I64


Wanted = Literal["last", "all"] | I64
"""Which of the tokens fed get logits: the last of each row, all, or those at some places, ascending, where the tokens
of all rows are counted on from 0. An empty array: none.
"""


class Backend(Protocol):
    """A model that is ready to run. Weights are shared; each sequence is its own.

    A sequence's logits do not depend on the other rows, nor on how its tokens are cut into calls; a backend may round
    differently, but says so.
    """

    @property
    def metadata(self) -> ModelMetadata:
        """What the file says of its model."""
        ...

    def new_sequence(self, capacity: int) -> Any:
        """An empty sequence (a TokenSequence) that can grow to `capacity` tokens, at most the model's context length;
        memory is taken as it grows.
        """
        ...

    def forward(self, rows: Sequence[Row], wanted: Wanted = "last") -> F32:
        """Feed each row's tokens to its sequence; the logits that are wanted, in order, `f32[wanted, vocab]`.

        Rows may be of any mix of lengths, each of another sequence. Raises ContextLengthError if tokens do not fit,
        UsageError for an id outside the vocabulary, an empty row, a sequence fed twice, or a place outside the tokens;
        then every sequence is as it was.
        """
        ...


def checked(rows: Sequence[Row], wanted: Wanted, vocab_size: int) -> I64:
    """The places of the tokens that get logits, ascending. Raises what `Backend.forward` raises for its arguments."""
    if not rows or len({id(row.sequence) for row in rows}) != len(rows):
        raise UsageError(f"rows: expected at least one, each of another sequence, got {len(rows)}")
    for sequence, tokens in rows:
        if tokens.ndim != 1 or not len(tokens):
            raise UsageError(f"tokens: expected i64[n] with n >= 1, got shape {tokens.shape}")
        length = sequence.length + len(tokens)
        if length > sequence.capacity:
            raise ContextLengthError(
                f"{length} tokens do not fit into a context of {sequence.capacity}; shorten the prompt"
            )
        low, high = tokens.min(), tokens.max()
        if low < 0 or high >= vocab_size:
            raise UsageError(f"token ids must lie in 0..{vocab_size - 1}, got {low}..{high}")
    ends = np.cumsum([len(row.tokens) for row in rows])
    if isinstance(wanted, str):
        return ends - 1 if wanted == "last" else np.arange(ends[-1])
    places = np.asarray(wanted, np.int64)
    if places.ndim != 1 or (len(places) and (places[0] < 0 or places[-1] >= ends[-1] or np.any(np.diff(places) <= 0))):
        raise UsageError(f"wanted: expected ascending places below {ends[-1]}, got {wanted}")
    return places
