"""How verbs print: JSON, sizes, tables, a model's text, progress on stderr."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from rkf.text.terminal import harmless, printable

if TYPE_CHECKING:
    from tqdm import tqdm


def open_streams() -> None:
    """Make the standard streams usable however the process was started. A character that a terminal lacks is shown
    escaped. A closed stream is opened again, or the next file that is opened would take its place: reading from stdin
    then gives nothing, and what is written to stderr is lost; writing to stdout fails.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest free number, which is this one
    sys.stdin = sys.stdin or os.fdopen(0, "r", closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def drop_unwritten() -> None:
    """Forget output that stdout cannot take: Python would complain of it again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


def print_json(value: Any) -> None:
    """One JSON document on stdout, control characters escaped."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=True, default=_plain))


def write_text(text: str) -> None:
    """Write model text to stdout at once: harmless on a terminal, unchanged elsewhere."""
    click.echo(harmless(text) if sys.stdout.isatty() else text, nl=False)


def size(count: float) -> str:
    """A number of bytes for people: decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def print_table(rows: Sequence[Sequence[object]]) -> None:
    """Print rows of cells in aligned columns: text to the left, numbers to the right."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row, shown in zip(rows, cells, strict=True):
        aligned = [
            text.rjust(width) if isinstance(cell, int | float) else text.ljust(width)
            for cell, text, width in zip(row, shown, widths, strict=True)
        ]
        click.echo("  ".join(aligned).rstrip())


def print_map(value: Mapping[str, Any], indent: int = 0) -> None:
    """Print a map as indented lines of `key  value`; a nested map goes below its key."""
    width = max((len(key) for key, item in value.items() if not isinstance(item, Mapping) or not item), default=0)
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            click.echo(" " * indent + printable(key))
            print_map(item, indent + 2)
        else:
            click.echo(" " * indent + f"{printable(key).ljust(width)}  {_line(item)}".rstrip())


@contextmanager
def progress_bar(description: str, unit: str) -> Iterator[tqdm[Any]]:
    """A bar on stderr that disappears at the end; nothing if stderr is not a terminal."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread for a bar: where none can be started, it would print a warning
    with tqdm(desc=description, unit=unit, unit_scale=True, leave=False, disable=None, miniters=1) as bar:
        yield bar


def reporter(bar: tqdm[Any]) -> Callable[[int, int], None]:
    """The bar as a callback of (done, total)."""

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return show


def _line(value: object) -> str:
    if value in (None, [], {}):
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_line, value))
    return printable(value.hex() if isinstance(value, bytes) else value)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    return str(value)
