"""The README's table of speed, from benchmarks/results/: `python -m benchmarks.table` prints it as Markdown, with the
classes of CPUs side by side.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
HEAD = (
    "| model | against | CPU | threads | task | tokens/s | ratio | of the ceiling |",
    "|---|---|---|---:|---|---:|---:|---:|",
)


def table(folder: Path) -> Iterator[str]:
    """The lines of the table; files in the order of their names."""
    yield from HEAD
    for path in sorted(folder.glob("*.json")):
        measured = json.loads(path.read_text())
        for row in measured["results"]:
            yield _line(row, measured["cpu_class"])


def _line(row: Mapping[str, Any], cpu_class: str) -> str:
    tokens = int(row["case"].split()[1])
    cells = (
        f"{row['rkf']} ({row['rkf_bytes'] / 1e6:.1f} MB)",
        f"{row['peer']} ({row['peer_bytes'] / 1e6:.1f} MB)",
        cpu_class,
        str(row["threads"]),
        _case(row["case"]),
        f"{tokens / row['rkf_s']:.0f} / {tokens / row['peer_s']:.0f}",
        f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})",
        f"{row['share']:.0%}" if "share" in row else "",
    )
    return f"| {' | '.join(cells)} |"


def _case(case: str) -> str:
    what, count, *after = case.split()
    if what == "prefill":
        return f"prefill {count}"
    return f"decode {count} after {int(after[0]):,}" if after[0] != "0" else f"decode {count}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS)
    print("\n".join(table(parser.parse_args().folder)))
