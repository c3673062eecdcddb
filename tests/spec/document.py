"""Reads the specification: its tables, its hexdump."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path
from typing import Any

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


def op_keys() -> dict[str, dict[str, dict[str, Any]]]:
    """op -> key -> its kind, its default (MISSING: required) and, for a number, what it has to be above."""
    kinds = {"values read": "value", "tensors": "tensor", "sizes": "size", "numbers": "number", "others": ""}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in table("program.md", "op", *kinds):
        entries = found.setdefault(code(row[0])[0], {"dst": {"kind": "value", "default": MISSING, "above": None}})
        for column, cell in zip(kinds.values(), row[1:], strict=True):
            for word, text in re.findall(r"(\w*) ?`([^`]+)`", cell):
                match = re.fullmatch(r"(\w+)(\??)( > 0)?(?: = (\w+))?", text)
                assert match is not None, text
                name, optional, positive, default = match.groups()
                kind = {"word": "choice"}.get(word, word) or column
                entry = {"kind": kind, "default": MISSING, "above": 0 if positive else None}
                if optional or kind == "flag":
                    entry["default"] = None if optional else False
                elif default:
                    entry["default"] = float(default) if kind == "number" else default
                entries[name] = entry
    return found
