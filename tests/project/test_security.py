"""SECURITY.md: every promise has tests, and these exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_promises_are_numbered_and_tested():
    rows = re.findall(r"^\| (\d+)\. [^|]+\| ([^|]+)\|$", TEXT, re.MULTILINE)
    assert [int(number) for number, _ in rows] == [*range(1, len(rows) + 1)]
    assert all("`tests/" in tests for _, tests in rows)


def test_named_files_exist():
    missing = [name for name in re.findall(r"`((?:tests|rkf|spec|docs)/[^`*]+)`", TEXT) if not (ROOT / name).exists()]
    assert not missing
