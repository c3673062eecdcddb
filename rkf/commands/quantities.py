"""Types of options that are numbers: written in digits 0 to 9, finite, within bounds.

The value is checked while the command line is parsed, before any work.
"""

from __future__ import annotations

import math
import re
from typing import Any

import click

from rkf.errors import UsageError

LARGEST = (1 << 31) - 1  # a count above this is a mistake in every option, and overflows some library
MOST_THREADS = 1024
_SHOWN = 40  # characters of a refused value


class Integer(click.IntRange):
    """A whole number from `min` to `max`; without `max`, to 2^31 - 1."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, str) and not re.fullmatch(r"-?[0-9]{1,20}", value):
            self.fail(f"{_short(value)} is not a whole number in digits 0 to 9.", param, ctx)
        number = int(super().convert(value, param, ctx))
        if self.max is None and number > LARGEST:
            self.fail(f"{number} is more than {LARGEST}.", param, ctx)
        return number


class Finite(click.FloatRange):
    """A finite number in a range."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, str) and not re.fullmatch(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", value):
            self.fail(f"{_short(value)} is not a number in digits 0 to 9.", param, ctx)
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{_short(value)} is too large.", param, ctx)
        return number


class Size(click.ParamType):
    """A number of bytes above 0, as people write it: 91MB, "1.2 GB", 500000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return byte_count(value)
        except UsageError as error:
            self.fail(f"{error}.", param, ctx)


class Numbers(click.ParamType):
    """Integer numbers from `least` to `most`, and ranges of them: "0,4-7"."""

    name = "numbers"

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        found: list[int] = []
        for part in value.split(","):
            match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", part.strip())
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if not self.least <= first <= last <= self.most:
                what = f"expected numbers from {self.least} to {self.most} and ranges of them, such as 4,8-16"
                self.fail(f"{_short(value)}: {what}.", param, ctx)
            found += range(first, last + 1)
        return found


POSITIVE = Finite(0, min_open=True)
NOT_NEGATIVE = Finite(0)
MINUTES = Finite(0, 525_600, min_open=True)  # up to a year
THREAD_COUNT = Integer(1, MOST_THREADS)


def byte_count(text: str) -> int:
    """The inverse of `rkf.commands.output.size`: "91MB", "1.2 GB", "500000". UsageError: anything else, or 0."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([kMGT]?)B?", text.strip())
    count = round(float(found[1]) * 1000 ** " kMGT".index(found[2] or " ")) if found else 0
    if count == 0:
        raise UsageError(f"{_short(text)}: expected a size such as 91MB or 1.2GB")
    return count


def _short(value: str) -> str:
    return repr(value if len(value) <= _SHOWN else f"{value[: _SHOWN - 1]}…")
