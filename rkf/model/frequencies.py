"""How a rope of a program turns: frequencies as numbers. Knows no family, and computes no angle."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Frequencies:
    """How rope turns: radians a position of each pair, and the factor of cosines and sines (attention scaling).

    long: the frequencies of a sequence that may grow past `original_context` positions.
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0
    long: tuple[float, ...] | None = None
    original_context: int | None = None

    def of(self, positions: int) -> tuple[float, ...]:
        """The frequencies of a sequence that may grow to so many positions."""
        if self.long is None or self.original_context is None or positions <= self.original_context:
            return self.frequencies
        return self.long
