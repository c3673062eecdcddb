"""The frequencies of a program's rope, as numbers. Knows no family, and computes no angle."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Frequencies:
    """The rotation of rope: radians per position of each pair, and the factor of cosines and sines (attention scale).

    long: the frequencies of a text of more than `original_context` positions.
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0
    long: tuple[float, ...] | None = None
    original_context: int | None = None

    def of(self, positions: int) -> tuple[float, ...]:
        """The frequencies of a text of so many positions."""
        if self.long is None or self.original_context is None or positions <= self.original_context:
            return self.frequencies
        return self.long
