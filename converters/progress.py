"""Progress reports of a long conversion."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

from rkf.text.terminal import printable


@dataclass(frozen=True, slots=True)
class Step:
    """A tensor has been written. done, total: weights. error: its relative squared error; None if it is dense."""

    name: str
    done: int
    total: int
    error: float | None


Progress = Callable[[Step], None]


@contextmanager
def bar(label: str) -> Iterator[Progress]:
    """A bar on stderr with tensor, error, speed and ETA; nothing if stderr is not a terminal."""
    with tqdm(desc=printable(label), unit="w", unit_scale=True, disable=None) as shown:

        def show(step: Step) -> None:
            shown.total = step.total
            error = "" if step.error is None else f" error {step.error:.2e}"
            shown.set_postfix_str(f"{printable(step.name)}{error}", refresh=False)
            shown.update(step.done - shown.n)

        yield show
