"""What the generation loop and the evaluators ask of an engine. Knows no device."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rkf.model.first_form import ModelConfig

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


class Cache(Protocol):
    """Keys and values of one sequence."""

    @property
    def length(self) -> int:
        """Tokens held."""
        ...

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens`, so that another continuation can follow a common beginning."""
        ...


class Backend(Protocol):
    """A model that is ready to run. Weights are shared; each sequence has a cache of its own."""

    @property
    def config(self) -> ModelConfig: ...

    def new_cache(self, tokens: int) -> Cache:
        """An empty cache that can grow to `tokens` positions; memory is taken as it grows."""
        ...

    def forward(self, tokens: I64, cache: Any, last_only: bool) -> F32:
        """Feed `tokens: i64[n]`, n >= 1, after what `cache` (one of `new_cache`) holds.

        Logits of all of them or of the last, `f32[n or 1, vocab]`. Raises ContextLengthError if they do not fit,
        UsageError for an id outside the vocabulary.
        """
        ...
