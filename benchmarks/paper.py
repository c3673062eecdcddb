"""docs/paper.md: each claim of arXiv 2603.17917's abstract beside our experiment, on two models.

    python -m benchmarks.paper                 # the page and its figures, from docs/paper/*/*/results.json
    python -m benchmarks.paper --text TEXT     # first runs the trials that are missing there

An interrupted run resumes. To run everything again, first remove docs/paper/*/*/results.json and build/paper; this
takes some hours on two cores. A checkpoint that lies here already is not fetched: --checkpoint Qwen2.5-Coder-0.5B=FILE.
TEXT: the validation text of WikiText-2 with its marks undone (` @-@ ` -> `-`, ` @,@ ` -> `,`, ` @.@ ` -> `.`, space
before `, . ; : ! ? % ) ]` removed, `<unk>` -> `Unk`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.paper_tuning import PLANS, recovered, tuning
from rkf.commands.default_model import NAME
from rkf.converters.pull import locate
from rkf.study.charts import Chart, Row, having, lines, only, svg
from rkf.study.records import RESULTS, TABLE, write_text
from rkf.study.records import read as read_results
from rkf.study.sweep import charts as sweep_charts
from rkf.study.sweep import worst as worst_trial
from rkf.text.reading import read_text

ROOT = Path(__file__).parents[1]
PAGE, DATA = ROOT / "docs" / "paper.md", ROOT / "docs" / "paper"
WORK = ROOT / "build" / "paper"
MODELS = {  # name -> what `rkf convert` takes
    "SmolLM2-135M": NAME,
    "Qwen2.5-Coder-0.5B": "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF:qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
}
LAYERS = {"SmolLM2-135M": "5,11,17,29", "Qwen2.5-Coder-0.5B": "4,8,13,23"}  # of the sweeps' trials of one layer
CONVERT = "convert SRC model.rkf --recipe paper-exceptions --k 32 --calibrate none"
EXTENT = "--text TEXT --windows 16 --ctx 256"
COMMANDS = {
    "sweep": f"study sweep SRC sweep {EXTENT} --k 8,16,32,64,256 --layers LAYERS",
    **{name: f"study {name} model.rkf {name} {EXTENT} --seeds 3" for name in ("scramble", "preserve", "drift")},
}
CHANGES = {  # of all layers: (study, change) -> its label in the figure; mean and variance are restored
    ("preserve", "ranks"): "evenly spaced",
    ("preserve", "gaussian"): "sorted Gaussian",
    ("preserve", "uniform"): "sorted uniform",
    ("scramble", "swap-1"): "neighbours swapped",
    ("scramble", "within-4"): "shuffled in fours",
    ("scramble", "whole"): "shuffled",
}
ORDER = {"preserve": "kept", "scramble": "broken"}
WHOLE: dict[str, Row] = {  # the trials that change all layers and restore mean and variance
    "scramble": {"restored": True, "kind": None, "layer": None},
    "preserve": {"matched": True, "where": "all"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=FILE")
    options = parser.parse_args()
    if options.text:
        sources = MODELS | dict(pair.split("=", 1) for pair in options.checkpoint)
        for model in MODELS:
            study(model, sources[model], options.text.resolve(), options.threads)
    text, figures = page()
    write_text(PAGE, text)
    for path, charts in figures.items():
        write_text(path, svg(*charts))


def study(model: str, source: str, text: Path, threads: int) -> None:
    """Run a model's missing trials in build/paper and copy results.json and results.csv back to docs/paper."""
    work = WORK / model
    work.mkdir(parents=True, exist_ok=True)
    given = {"SRC": str(locate(source).resolve()), "TEXT": str(text), "LAYERS": LAYERS[model]}

    def rkf(command: Sequence[str]) -> None:
        words = [given.get(word, word) for word in command]
        subprocess.run([sys.executable, "-m", "rkf", *words], cwd=work, check=True)

    def convert(out: Path, options: Sequence[str]) -> None:
        rkf(["convert", "SRC", str(out), *options])

    if not (work / "model.rkf").exists():
        rkf(CONVERT.split())
    for name, command in COMMANDS.items():
        with _kept(model, name):
            rkf([*command.split(), "--threads", str(threads)])
    if _stored(model, "tune") < PLANS[model].trials:
        with _kept(model, "tune"):
            tuning(work / "tune", PLANS[model], read_text(text), threads, convert=convert)


def _stored(model: str, name: str) -> int:
    """The trials of a study in docs/paper. Those of a complete one stay, though later versions convert otherwise."""
    return len(results(model, name)[1]) if (DATA / model / name / RESULTS).exists() else 0


@contextmanager
def _kept(model: str, name: str) -> Iterator[None]:
    """Start a study from its results in docs/paper, unless it has begun here, and copy its results there, even if it is
    interrupted.
    """
    there, here = DATA / model / name, WORK / model / name
    for folder in (there, here):
        folder.mkdir(parents=True, exist_ok=True)
    if not (here / RESULTS).exists():
        _copy(there, here)
    try:
        yield
    finally:
        _copy(here, there)


def _copy(source: Path, target: Path) -> None:
    for name in (RESULTS, TABLE):
        if (source / name).exists():
            shutil.copy(source / name, target / name)


def page() -> tuple[str, dict[Path, list[Chart]]]:
    """docs/paper.md and the panels of its figures, by file."""
    figures: dict[Path, list[Chart]] = {}

    def figure(name: str) -> str:
        path, title = DATA / f"{name}.svg", FIGURES[name][0]
        figures[path] = [replace(FIGURES[name][1](model), title=model) for model in MODELS]
        return f"![{title}]({path.relative_to(PAGE.parent).as_posix()})"

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    words = {
        "models": list(MODELS),
        "figure": figure,
        "value": value,
        "worst": worst,
        "tunings": tunings,
        "share": share,
        "own_text": own_text,
        "stream": stream,
        "drifted": drifted,
        "windows": {model: plan.windows for model, plan in PLANS.items()},
        "layers": " and ".join(f"{LAYERS[model]} ({model})" for model in MODELS),
        "collapse": collapse,
        "commands": [CONVERT, *COMMANDS.values()],
        "trials": sum(len(results(model, name)[1]) for model in MODELS for name in COMMANDS),
    }
    return templates.get_template("paper.md.jinja").render(words), figures


@cache
def results(model: str, name: str) -> tuple[dict[str, Any], list[Row]]:
    """The description of a study, and its trials."""
    return read_results(DATA / model / name)


def values(model: str) -> Chart:
    """Perplexity by K."""
    about, rows = results(model, "sweep")
    return next(chart for chart in sweep_charts(rows, about["matrices"]) if chart.name == "k")


def order(model: str) -> Chart:
    """All layers changed, order kept and broken."""
    rows = [{**row, "change": label} for (name, change), label in CHANGES.items() for row in _all(model, name, change)]
    return Chart("order", "", rows, x="change", series="order")


def distance(model: str) -> Chart:
    """All layers changed: how far the weights moved, and whether the order is kept."""
    rows = [row for name in ORDER for row in _all(model, name) if row["error"] < 1]
    return Chart("distance", "", rows, x="error", series="order", y="kld")


def layers(model: str) -> Chart:
    """One layer at a time."""
    rows = [
        {**row, "order": ORDER[name]}
        for name, change in (("preserve", "gaussian"), ("scramble", "whole"))
        for row in having(only(results(model, name)[1], change=change), "layer")
    ]
    return Chart("layers", "", rows, x="layer", series="order")


def drift(model: str) -> Chart:
    """More and more layers, from the first on."""
    rows = only(results(model, "drift")[1], order="first")
    return Chart("drift", "", having(rows, "correction"), x="replaced", series="correction")


FIGURES: dict[str, tuple[str, Callable[[str], Chart]]] = {
    "values": ("Perplexity by K", values),
    "order": ("Values changed in all layers, order kept and broken", order),
    "layers": ("Values changed in one layer: sorted Gaussian draws (order kept), shuffled (broken)", layers),
    "drift": ("More and more layers replaced", drift),
    "distance": ("Divergence by how far the weights moved, all layers", distance),
}


def _all(model: str, name: str, change: str | None = None) -> list[Row]:
    """Trials of a study that change all layers and restore mean and variance, with whether they keep the order."""
    found = only(results(model, name)[1], **WHOLE[name])
    return [{**row, "order": ORDER[name]} for row in found if change in (None, row["change"])]


def value(model: str, name: str, y: str = "ppl_ratio", **factors: Any) -> str:
    """The mean of a figure over the trials with these factors; with several seeds, also its standard error."""
    rows = only(results(model, name)[1], **factors)
    if not rows:
        raise KeyError(f"{model}, {name}: no trial with {factors}")
    return averaged(rows, y)


def averaged(rows: list[Row], y: str) -> str:
    """The mean over some trials; with several, also its standard error."""
    ((point,),) = lines(Chart("", "", [{**row, "all": ""} for row in rows], x="all", y=y)).values()
    return shown(point.mean) + (f" ({point.spread})" if point.trials > 1 and point.spread else "")


def worst(model: str, name: str, **factors: Any) -> str:
    """The largest ratio of perplexities among the trials of one layer with these factors."""
    return shown(max(row["ppl_ratio"] for row in having(only(results(model, name)[1], **factors), "layer")))


def tunings(model: str) -> str:
    """A model before and after tuning, as lines of a table in Markdown."""
    rows, found = results(model, "tune")[1], []
    for before in only(rows, factors=None):
        found.append(f"| {model} | {before['model']} | nothing | | | {_figures(before)} | | |")
        for row in having(only(rows, model=before["model"]), "factors"):
            spent = f"{row['parameters']:,} | {row['steps']}"
            ppl, kld = recovered(rows, row)
            learned = f"centroids, factors per {row['factors']}"
            found.append(f"| | | {learned} | {spent} | {_figures(row)} | {kld:.0%} | {ppl:.0%} |")
    return "\n".join(found)


def _figures(row: Row) -> str:
    return f"{row['kld']:.4f} ± {row['kld_stderr']:.4f} | {row['ppl']:.2f}"


def share(model: str, tuned: str, factors: str) -> str:
    """The recovered share of the added perplexity and of the divergence."""
    rows = results(model, "tune")[1]
    (row,) = only(rows, model=tuned, factors=factors)
    return "{:.0%} ({:.0%})".format(*recovered(rows, row))


def own_text(model: str, tuned: str, factors: str) -> str:
    """The recovered share of the divergence on text of the model's own."""
    (row,) = only(results(model, "tune")[1], model=tuned, factors=factors)
    return f"{row['own_text']:.0%}"


def stream(model: str, measure: str, correction: str) -> str:
    """The residual stream after the last layer, all layers replaced: its "scale" or "spearman"."""
    rows = [row for row in only(results(model, "drift")[1], correction=correction) if "profile" in row]
    return averaged([{**row, measure: row["profile"][measure][-1]} for row in rows], measure)


def drifted(model: str, correction: str) -> str:
    """The mean ratio of perplexities with all layers replaced."""
    about, rows = results(model, "drift")
    return averaged(only(rows, correction=correction, replaced=len(about["layers"])), "ppl_ratio")


def collapse(model: str) -> dict[str, Any]:
    """The matrix whose plain clustering harms the model most, with its largest weight."""
    about, rows = results(model, "sweep")
    guilty = worst_trial(having(rows, "kind"))
    (found,) = only(about["matrices"], layer=guilty["layer"], kind=guilty["kind"])
    return found | {"ppl_ratio": shown(guilty["ppl_ratio"])}


def shown(number: float) -> str:
    """Three digits; a power of ten for large numbers."""
    if number < 1e4:
        return f"{number:.3g}" if number < 1000 else f"{number:.0f}"
    digits, exponent = f"{number:.1e}".split("e")
    return f"{digits}·10^{int(exponent)}"


if __name__ == "__main__":
    main()
