"""Resident memory of this process, and the part of it that is pages of a model file. Measures; frees nothing."""

from __future__ import annotations

import re
import resource
import sys
from os import PathLike
from pathlib import Path

from rkf.format.part_directory import index_name

_PROC = Path("/proc/self")
_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)")


def resident(path: str | PathLike[str]) -> dict[str, int]:
    """{"rss_bytes"}: the current value on Linux, the peak elsewhere. On Linux also {"mapped_bytes",
    "mapped_pss_bytes"}: the pages of the file at `path`, or of its parts, in it, and the same with each page divided by
    the number of processes that hold it.
    """
    if not (_PROC / "smaps").exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"rss_bytes": peak if sys.platform == "darwin" else peak * 1024}
    file, inside = Path(path).resolve(), False
    found = dict.fromkeys(("rss_bytes", "mapped_bytes", "mapped_pss_bytes"), 0)
    for line in (_PROC / "smaps").read_text().splitlines():
        if mapping := _MAPPING.fullmatch(line):
            place = Path(mapping[1])
            inside = place.parent == file.parent and file.name in (place.name, index_name(place.name))
            continue
        field, _, value = line.partition(":")
        if field == "Rss":
            found["rss_bytes"] += _bytes(value)
            found["mapped_bytes"] += _bytes(value) * inside
        elif field == "Pss":
            found["mapped_pss_bytes"] += _bytes(value) * inside
    return found


def _bytes(value: str) -> int:
    """The bytes of a value like `     123 kB`."""
    return int(value.split()[0]) * 1024
