"""How much memory keys and values may take when nobody says so."""

from __future__ import annotations

import os
from pathlib import Path

_LEAST = 1 << 28


def default_memory_bytes() -> int:
    """Half of the memory that is available now, at least 256 MB."""
    return max(_available() // 2, _LEAST)


def _available() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        if "MemAvailable" in fields:
            return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
