"""Opens every file of a folder in one process and prints the cost of each. test_bounds.py starts it. Linux only."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tests.hostile.reading import outcome
from tests.spec.document import VECTORS


def resident(field: str) -> int:
    """The bytes in a line of /proc/self/status: VmRSS, VmHWM."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main(folder: Path) -> None:
    outcome(VECTORS / "zstd.rkf")  # libraries make their one-time allocations here
    taken = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_size):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before, start = resident("VmRSS"), time.process_time()
        result = outcome(path)
        seconds, grown = time.process_time() - start, resident("VmHWM") - before
        refused, size = isinstance(result, str), path.stat().st_size
        del result
        taken.append({"name": path.name, "file_bytes": size, "refused": refused, "grown": grown, "seconds": seconds})
    print(json.dumps(taken))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
