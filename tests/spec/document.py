"""Reads the specification: its tables, its hexdump."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

SPEC = Path(__file__).resolve().parents[2] / "spec"
VECTORS = SPEC / "vectors"


def table(document: str, *head: str, holding: str = "") -> list[list[str]]:
    """The rows of the one table with these column heads, and with `holding` in its first column."""
    tables = [rows for rows in _tables(document, head) if not holding or any(holding in row[0] for row in rows)]
    assert len(tables) == 1, f"{document} has {len(tables)} tables with the head {head}"
    return tables[0]


def _tables(document: str, head: tuple[str, ...]) -> Iterator[list[list[str]]]:
    lines = (SPEC / document).read_text().splitlines()
    for start, line in enumerate(lines):
        if line == f"| {' | '.join(head)} |":
            yield _rows(lines[start + 2 :])


def _rows(lines: list[str]) -> list[list[str]]:
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def code(cell: str) -> list[str]:
    """The texts in backticks in a cell."""
    return re.findall(r"`([^`]*)`", cell)


def hexdump(document: str) -> bytes:
    """The bytes of the hexdump: offset, bytes; `*` stands for zeros up to the next offset."""
    data = bytearray()
    for line in (SPEC / document).read_text().splitlines():
        match = re.fullmatch(r"([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+)", line)
        if match:
            data += bytes(int(match[1], 16) - len(data)) + bytes.fromhex(match[2])
    return bytes(data)
