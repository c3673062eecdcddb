"""The interface of an engine to the generation loop, the server and the evaluators. Knows no device."""

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
    """The tokens that a model has read, in the form of its memory of them: keys, values, states."""

    @property
    def capacity(self) -> int:
        """The maximum number of tokens."""
        ...

    @property
    def length(self) -> int:
        """The number of tokens held."""
        ...

    @property
    def rewinds(self) -> bool:
        """Whether `truncate` can go back to every length. A layer with a state has only copies of earlier ones, a layer
        with a window no longer holds the positions behind it: they need marks.
        """
        ...

    @property
    def takes_back(self) -> bool:
        """Whether `truncate` can take back any of the tokens of the last call. A layer with a state cannot."""
        ...

    def mark(self) -> None:
        """Let `truncate` go back to the present length later. Only the last few marks count."""
        ...

    def truncate(self, tokens: int) -> None:
        """Keep only the first `tokens`, so that another continuation can follow a common beginning.

        Raises UsageError for a length that it cannot go back to.
        """
        ...

    def reusable(self, tokens: int) -> int:
        """The longest beginning of at most `tokens` to which `truncate` can go back."""
        ...

    def fork(self) -> Any:
        """Another sequence with the same tokens. The two share memory as far as the backend can."""
        ...

    def growth_bytes(self, tokens: int) -> int:
        """The memory that so many more tokens take, beside what is held; 0 if the backend does not know."""
        ...


class Row(NamedTuple):
    """New tokens of one sequence: `tokens: i64[n]`, n >= 1, which follow those that it holds."""

    sequence: Any
    tokens: I64


Wanted = Literal["last", "all"] | I64
"""The new tokens that get logits: the last of each row, all, or those at ascending places, where the tokens of all rows
are numbered from 0. An empty array: none.
"""

NO_HIDDEN = "this model has no norm before its logits, so no hidden states: use another one for embeddings"


class Backend(Protocol):
    """A model that is ready to run. Sequences share its weights and nothing else.

    A sequence's logits depend neither on the other rows nor on how its tokens are split into calls. A backend that may
    round differently says so. Ropes with long frequencies are an exception: the length of the text after a call decides
    whether that call's logits have them (rope_choice.py).
    """

    @property
    def metadata(self) -> ModelMetadata:
        """The file's description of its model."""
        ...

    @property
    def pass_tokens(self) -> int:
        """The maximum number of tokens of one pass; `forward` computes more of them in several."""
        ...

    @property
    def held_bytes(self) -> int:
        """The memory of all sequences; 0 if the backend does not know."""
        ...

    def new_sequence(self, capacity: int) -> Any:
        """An empty sequence (a TokenSequence) that can grow to `capacity` tokens, at most the model's context length.
        Its memory grows with it.
        """
        ...

    def forward(self, rows: Sequence[Row], wanted: Wanted = "last") -> F32:
        """Compute each row's tokens in its sequence. Returns the wanted logits, in order, `f32[wanted, vocab]`.

        Rows may have any mix of lengths, each for another sequence. Raises ContextLengthError if tokens do not fit,
        UsageError for an id outside the vocabulary, an empty row, a sequence used twice, or a place outside the tokens.
        After an error every sequence is unchanged.
        """
        ...

    def hidden(self, rows: Sequence[Row], wanted: Wanted = "last") -> F32:
        """As `forward`, with hidden states in place of logits: what the last norm writes (`Program.final_norm`),
        `f32[wanted, width]`. Raises UsageError also if the program has no such norm.
        """
        ...


def with_tokens_again(rows: Sequence[Row], places: I64) -> tuple[Sequence[Row], I64]:
    """Rows and places of wanted logits with the tokens first that sequences must compute again (rope_choice.py)."""
    again = [row.sequence.tokens_again(row.tokens) for row in rows]
    if not any(map(len, again)):
        return rows, places
    ends, shifts = (np.cumsum([len(ids) for ids in each]) for each in ([row.tokens for row in rows], again))
    longer = [Row(row.sequence, np.concatenate([held, row.tokens])) for row, held in zip(rows, again, strict=True)]
    return longer, places + shifts[np.searchsorted(ends, places, side="right")]


def checked(rows: Sequence[Row], wanted: Wanted, vocab_size: int) -> I64:
    """The places of the tokens that get logits, ascending. Raises the errors of `Backend.forward` for its arguments."""
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
