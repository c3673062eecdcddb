"""docs/paper.md: each claim of arXiv 2603.17917's abstract beside our experiment.

    python -m benchmarks.paper                 # the page and its figures, from docs/paper/*/results.json
    python -m benchmarks.paper --text TEXT     # first runs the trials that are missing there

An interrupted run resumes. To run everything again, first remove docs/paper/*/results.json and build/paper; this takes
some hours on two cores. TEXT: the validation text of WikiText-2 with its marks undone (` @-@ ` -> `-`, ` @,@ ` -> `,`,
` @.@ ` -> `.`, space before `, . ; : ! ? % ) ]` removed, `<unk>` -> `Unk`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.paper_tuning import recovered, tuning
from rkf.commands.default_model import NAME
from rkf.converters.pull import pull
from rkf.study import STUDIES
from rkf.study.charts import Chart, Row, having, lines, only, svg, table
from rkf.study.records import RESULTS, TABLE, write_text
from rkf.study.records import read as read_results
from rkf.study.sweep import COLLAPSE_K
from rkf.study.sweep import charts as sweep_charts
from rkf.study.sweep import worst as worst_trial
from rkf.text.reading import read_text

ROOT = Path(__file__).parents[1]
PAGE, DATA = ROOT / "docs" / "paper.md", ROOT / "docs" / "paper"
WORK = ROOT / "build" / "paper"
MODEL = "model.rkf"
CONVERT = f"convert {NAME} {MODEL} --recipe paper-exceptions --k 32 --calibrate none"
COMMANDS = {
    "sweep": f"study sweep {NAME} sweep --text TEXT --windows 4 --layers 5,11,17,29 --calibrate self",
    "scramble": f"study scramble {MODEL} scramble --text TEXT --windows 4 --seeds 3",
    "preserve": f"study preserve {MODEL} preserve --text TEXT --windows 4 --seeds 3",
    "drift": f"study drift {MODEL} drift --text TEXT --windows 4 --seeds 3",
    "interpolate": f"study interpolate {MODEL} interpolate --text TEXT --windows 8 --seeds 1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if options.text:
        study(options.text.resolve(), options.threads)
    text, figures = page()
    write_text(PAGE, text)
    for path, chart in figures.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, svg(chart))


def study(text: Path, threads: int) -> None:
    """Run the missing trials in build/paper and copy results.json and results.csv back to docs/paper."""
    WORK.mkdir(parents=True, exist_ok=True)
    pull(NAME)
    if not (WORK / MODEL).exists():
        _rkf(CONVERT.split())
    for name, command in COMMANDS.items():
        with _kept(name):
            _rkf([*(str(text) if word == "TEXT" else word for word in command.split()), "--threads", str(threads)])
    with _kept("tune"):
        words = read_text(text)
        tuning(WORK / "tune", words, threads, convert=lambda out, how: _rkf(["convert", NAME, str(out), *how]))


@contextmanager
def _kept(name: str) -> Iterator[None]:
    """Start a study from its results in docs/paper and copy its results back there, even if it is interrupted."""
    for folder in (WORK / name, DATA / name):
        folder.mkdir(parents=True, exist_ok=True)
    _copy(DATA / name, WORK / name)
    try:
        yield
    finally:
        _copy(WORK / name, DATA / name)


def _rkf(arguments: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "rkf", *arguments], cwd=WORK, check=True)


def _copy(source: Path, target: Path) -> None:
    for name in (RESULTS, TABLE):
        if (source / name).exists():
            shutil.copy(source / name, target / name)


def page() -> tuple[str, dict[Path, Chart]]:
    """docs/paper.md and its figures, by file."""
    figures: dict[Path, Chart] = {}

    def figure(name: str, chart: str) -> str:
        """A figure, with the command that repeats it below."""
        path, drawn = DATA / name / f"{chart}.svg", charts(name)[chart]
        figures[path] = drawn
        return f"![{drawn.title}]({path.relative_to(PAGE.parent).as_posix()})\n\n{drawn.title}:\n{command(name)}"

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    words = {
        "figure": figure,
        "grid": grid,
        "value": value,
        "worst": worst,
        "about": about,
        "basis": basis,
        "tunings": tunings,
        "share": share,
        "matrices": matrices,
        "stream": stream,
        "convert": CONVERT,
        "collapse_k": COLLAPSE_K,
        "command": command,
    }
    return templates.get_template("paper.md.jinja").render(words), figures


@cache
def results(name: str) -> tuple[dict[str, Any], list[Row]]:
    return read_results(DATA / name)


def charts(name: str) -> dict[str, Chart]:
    """The figures of a study by name; "order" combines several studies."""
    if name == "order":
        drawn = [distance(), layers()]
    elif name == "sweep":
        about, rows = results(name)
        drawn = sweep_charts(rows, about["matrices"])
    else:
        drawn = STUDIES[name].charts(results(name)[1])
    return {chart.name: chart for chart in drawn}


def distance() -> Chart:
    """Trials that change all layers: how far the weights moved, and whether the order is kept."""
    rows = [{**row, "order": "broken"} for row in only(results("scramble")[1], kind=None, layer=None)]
    rows += [{**row, "order": "kept"} for row in only(results("preserve")[1], where="all")]
    near = [row for row in rows if row["error"] < 1]
    return Chart("distance", "All layers: divergence by how far the weights moved", near, "error", "order", "kld")


def layers() -> Chart:
    """One layer at a time under three kinds of change."""
    rows = [{**row, "change": f"{row['change']}, order broken"} for row in having(results("scramble")[1], "layer")]
    rows += [{**row, "change": "gaussian, order kept"} for row in having(results("preserve")[1], "layer")]
    return Chart("layers", "One layer alone", rows, "layer", "change", "kld")


def grid(name: str, chart: str) -> str:
    """The table of a figure, in Markdown."""
    head, *body = table(charts(name)[chart])
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] + ["---:"] * (len(head) - 1), *body))


def value(name: str, y: str = "ppl_ratio", **factors: Any) -> str:
    """The mean of a figure over the trials with these factors; with several seeds, also its standard error."""
    rows = only(results(name)[1], **factors)
    if not rows:
        raise KeyError(f"{name}: no trial with {factors}")
    return averaged(rows, y)


def averaged(rows: list[Row], y: str) -> str:
    """The mean over some trials; with several, also its standard error."""
    ((point,),) = lines(Chart("", "", [{**row, "all": ""} for row in rows], x="all", y=y)).values()
    return shown(point.mean) + (f" ({point.spread})" if point.trials > 1 else "")


def worst(name: str, **factors: Any) -> str:
    """The largest ratio of perplexities among the trials of one layer with these factors."""
    return shown(max(row["ppl_ratio"] for row in having(only(results(name)[1], **factors), "layer")))


def about(name: str) -> dict[str, Any]:
    """The description of a study."""
    return results(name)[0]


def basis() -> str:
    """The extent of each study, in Markdown."""
    lines = ["| study | windows of 512 tokens | trials | seeds |", "|---|---:|---:|---:|"]
    for name in ("sweep", *STUDIES, "tune"):
        known, rows = results(name)
        seeds = len({row.get("seed") for row in rows} - {None})
        lines.append(f"| {name} | {known['windows']} | {len(rows)} | {seeds or ''} |")
    return "\n".join(lines)


def tunings() -> str:
    """Models before and after tuning, in Markdown."""
    rows = results("tune")[1]
    lines = [
        "| model | tuned | parameters | steps | minutes | divergence | perplexity | KLD recovered | ppl recovered |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for before in only(rows, factors=None):
        lines.append(f"| {before['model']} | nothing | | | | {_figures(before)} | | |")
        for row in having(only(rows, model=before["model"]), "factors"):
            spent = f"{row['parameters']:,} | {row['steps']} | {row['minutes']}"
            ppl, kld = recovered(rows, row)
            learned = f"centroids, factors per {row['factors']}"
            lines.append(f"| | {learned} | {spent} | {_figures(row)} | {kld:.1%} | {ppl:.1%} |")
    return "\n".join(lines)


def _figures(row: Row) -> str:
    return f"{row['kld']:.4f} ± {row['kld_stderr']:.4f} | {row['ppl']:.2f}"


def share(model: str, factors: str) -> str:
    """The recovered share of the added perplexity and of the divergence."""
    rows = results("tune")[1]
    (row,) = only(rows, model=model, factors=factors)
    return "{:.0%} ({:.0%})".format(*recovered(rows, row))


def stream(measure: str, correction: str) -> str:
    """The residual stream after the last layer, all layers replaced: its "scale" or "spearman"."""
    rows = only(charts("drift")["scale"].rows, correction=correction)
    return averaged(only(rows, layer=max(row["layer"] for row in rows)), measure)


def matrices() -> tuple[dict[str, Any], dict[str, Any]]:
    """The matrix that collapses, and the one among the others whose largest weight loses most."""
    guilty = worst_trial(having(results("sweep")[1], "kind"))
    known = about("sweep")["matrices"]
    (collapsing,) = only(known, layer=guilty["layer"], kind=guilty["kind"])
    others = [row for row in known if row is not collapsing]
    return collapsing, max(others, key=lambda row: float(row["largest"] - row["stored"]))


def shown(number: float) -> str:
    """Three digits; a power of ten for large numbers."""
    if number < 1e4:
        return f"{number:.3g}" if number < 1000 else f"{number:.0f}"
    digits, exponent = f"{number:.1e}".split("e")
    return f"{digits}·10^{int(exponent)}"


def command(name: str) -> str:
    """The command that repeats a figure, as a user types it."""
    names = ["scramble", "preserve"] if name == "order" else [name]
    return ";\n".join(f"`rkf {COMMANDS[each]}`" for each in names)


if __name__ == "__main__":
    main()
