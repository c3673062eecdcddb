"""The report of a study: Markdown with separate figures, and one HTML page that contains everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rkf.study.charts import Chart, svg, table
from rkf.study.records import write_text

PAGES = ("report.md", "report.html")
_FACTS = {
    "model": "model",
    "reference": "reference",
    "windows": "windows",
    "ctx": "tokens per window",
    "ppl": "perplexity of the reference",
    "layers": "layers",
}


def write(folder: Path, title: str, text: str, about: dict[str, Any], charts: list[Chart]) -> None:
    """Write report.md, report.html and a figure for every chart that has rows."""
    figures = [
        {"name": chart.name, "title": chart.title, "svg": svg(chart), "table": table(chart)}
        for chart in charts
        if chart.rows
    ]
    for figure in figures:
        write_text(folder / f"{figure['name']}.svg", str(figure["svg"]))
    facts = {label: about[key] for key, label in _FACTS.items() if key in about}
    templates = Environment(
        loader=PackageLoader("rkf.study"),
        undefined=StrictUndefined,
        trim_blocks=True,
        autoescape=lambda name: "html" in (name or ""),
    )
    for name in PAGES:
        page = templates.get_template(f"{name}.jinja")
        write_text(
            folder / name, page.render(title=title, text=text, facts=facts, figures=figures, command=about["command"])
        )
