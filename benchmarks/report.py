"""The quality results as tables, with rkf compared to each peer.

`python -m benchmarks.report MODEL.json… PLOT.svg` plots them side by side (with matplotlib, from the extra `study`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
_COLUMNS = ("MB", "KLD", "±", "ppl ratio", "top-1")


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, sorted by size."""
    head = f"| model | {' | '.join(_COLUMNS)} |\n|---|{'---:|' * len(_COLUMNS)}\n"
    return head + "\n".join(_line(row) for row in sorted(rows, key=lambda row: row["bytes"]))


def _line(row: Row) -> str:
    cells = (
        row["name"],
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['kld']:.4f}",
        f"{row['kld_stderr']:.4f}",
        f"{row['ppl_ratio']:.4f}",
        f"{row['top1']:.1%}",
    )
    return f"| {' | '.join(cells)} |"


def ratios(rows: Sequence[Row]) -> str:
    """Markdown: our KLD at each peer's size and our size at each peer's KLD, as multiples of the peer's.

    Between our files, log KLD is interpolated linearly over size; outside of them there is no figure.
    """
    ours, peers = _split(rows)
    sizes = np.array([row["bytes"] for row in ours], float)
    logs = np.log([row["kld"] for row in ours])
    lines = ["| peer | our KLD at its size | our size at its KLD |", "|---|---:|---:|"]
    for peer in peers:
        kld = np.interp(peer["bytes"], sizes, logs, left=np.nan, right=np.nan)
        size = np.interp(-np.log(peer["kld"]), -logs, sizes, left=np.nan, right=np.nan)
        cells = (np.exp(kld) / peer["kld"], size / peer["bytes"])
        lines.append(f"| {peer['name']} | {' | '.join('-' if np.isnan(x) else f'{x:.2f} x' for x in cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], out: Path) -> None:
    """Plot KLD over size, with a panel for each text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(results), 4.2), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for panel, (text, result) in zip(panels, results.items(), strict=True):
        ours, peers = _split(result["models"])
        panel.plot([row["bytes"] / 1e6 for row in ours], [row["kld"] for row in ours], "o-", label="rkf")
        panel.plot([row["bytes"] / 1e6 for row in peers], [row["kld"] for row in peers], "s", label="peers")
        for row in peers:
            panel.annotate(
                row["name"], (row["bytes"] / 1e6, row["kld"]), (4, 4), textcoords="offset points", fontsize=8
            )
        panel.set(yscale="log", xlabel="MB", ylabel="KL divergence from the source", title=text)
        panel.legend()
    figure.savefig(out, metadata={"Date": None})


def _split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Our rows by size, and the others."""
    ours = sorted((row for row in rows if row["name"].startswith("rkf")), key=lambda row: row["bytes"])
    return ours, [row for row in rows if row not in ours]


def merged(files: Sequence[Path]) -> dict[str, Any]:
    """The results of several models, one for each model and text. Each file is named after its model."""
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    return {f"{model}, {text}": result for model, texts in found.items() for text, result in texts.items()}


if __name__ == "__main__":
    *inputs, plot = map(Path, sys.argv[1:])
    draw(merged(inputs), plot)
