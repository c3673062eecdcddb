"""Rows of a study as figures and tables: which columns to plot; repeated seeds as mean and standard error."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

Row = dict[str, Any]
LABELS = {
    "ppl": "perplexity",
    "ppl_ratio": "perplexity relative to the reference",
    "kld": "KL divergence, nats per token",
    "error": "squared error relative to the weights' variance",
    "correlation": "correlation with the unchanged weights",
    "bits": "bits per clustered weight",
    "survive": "layers",
    "replaced": "layers replaced",
    "largest": "largest weight, in standard deviations",
    "scale": "RMS of the residual stream, relative to the unchanged model",
    "spearman": "rank correlation with the unchanged model's residual stream",
}
_BASES = {"error": 10, "k": 2}  # of logarithmic x axes
_LOGARITHMIC = {"ppl", "ppl_ratio", "kld", "scale"}
_MEASURED = {"error", "correlation"}  # x values that differ from trial to trial


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure: rows by x, a line for each value of `series`. name: that of its file, unique in a study."""

    name: str
    title: str
    rows: Sequence[Row]
    x: str
    series: str | None = None
    y: str = "ppl_ratio"

    @property
    def is_scatter(self) -> bool:
        """Whether x is a measurement, so that every trial is its own point."""
        return self.x in _MEASURED


class Point(NamedTuple):
    """The mean over the seeds of one x (geometric for logarithmic measures) and its standard error."""

    x: Any
    mean: float
    error: float
    trials: int
    factor: float | None = None  # standard error of a geometric mean, up or down

    @property
    def bars(self) -> tuple[float, float]:
        """How far the error reaches down and up."""
        if self.factor is None:
            return self.error, self.error
        return self.mean * (1 - 1 / self.factor), self.mean * (self.factor - 1)

    @property
    def spread(self) -> str:
        """The error as text: "± 0.1", or "×÷ 5" for a geometric mean with an error above a half."""
        if self.factor is not None and self.factor > 1.5:
            return f"×÷ {self.factor:.{0 if self.factor >= 10 else 1}f}"
        return f"± {self.error:.1g}" if self.error else ""


def only(rows: Iterable[Row], **values: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in values.items())]


def having(rows: Iterable[Row], key: str) -> list[Row]:
    """The rows that have a value for this factor."""
    return [row for row in rows if row.get(key) is not None]


def lines(chart: Chart) -> dict[str, list[Point]]:
    """The points of each series, in order of appearance; numbers ascend."""
    return {
        "" if name is None else _shown(name): _points(chart, [row for row in chart.rows if _series(chart, row) == name])
        for name in dict.fromkeys(_series(chart, row) for row in chart.rows)
    }


def table(chart: Chart) -> list[list[str]]:
    """Head and body: a line for each x, a column for each series."""
    found = lines(chart)
    xs = _ordered(point.x for points in found.values() for point in points)
    head = [chart.x, *(f"{chart.series} {name}" if name else LABELS.get(chart.y, chart.y) for name in found)]
    cells = {(name, point.x): point for name, points in found.items() for point in points}
    return [head, *([_shown(x), *(_cell(cells.get((name, x))) for name in found)] for x in xs)]


def svg(*charts: Chart) -> str:
    """The figure; equal rows give equal bytes."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": charts[0].name, "font.size": 9}):
        drawn = io.StringIO()
        FigureCanvasSVG(draw(*charts)).print_svg(drawn, metadata={"Date": None})
    return drawn.getvalue()


def draw(*charts: Chart) -> Figure:
    """The figure as a matplotlib object. Several charts lie side by side, each under its title, with one y axis."""
    figure = Figure(figsize=(7.2, 3.8 if len(charts) == 1 else 3.4), layout="constrained")
    panels = figure.subplots(1, len(charts), sharey=True, squeeze=False)[0]
    for axes, chart in zip(panels, charts, strict=True):
        _plot(axes, chart)
        if len(charts) > 1:
            axes.set_title(chart.title)
    panels[0].set_ylabel(LABELS.get(charts[0].y, charts[0].y))
    if len(lines(charts[0])) > 1:
        panels[0].legend(title=charts[0].series, fontsize=8)
    return figure


def _plot(axes: Axes, chart: Chart) -> None:
    found = lines(chart)
    xs = _ordered(point.x for points in found.values() for point in points)
    numbers = all(map(_is_number, xs))
    places = {x: x if numbers else i for i, x in enumerate(xs)}
    for name, points in found.items():
        at = [places[point.x] for point in points]
        means, errors = [point.mean for point in points], list(zip(*(point.bars for point in points), strict=True))
        style = "o-" if numbers and not chart.is_scatter else "o"
        axes.errorbar(at, means, errors, fmt=style, markersize=3.5, linewidth=1, capsize=2, label=name)
    if not numbers:
        axes.set_xticks(range(len(xs)), [_shown(x) for x in xs], rotation=30, ha="right")
    if chart.x in _BASES:
        axes.set_xscale("log", base=_BASES[chart.x])
    if chart.y in _LOGARITHMIC:
        axes.set_yscale("log")
    axes.set_xlabel(LABELS.get(chart.x, chart.x))
    axes.grid(alpha=0.3)


def _series(chart: Chart, row: Row) -> Any:
    return None if chart.series is None else row[chart.series]


def _points(chart: Chart, rows: list[Row]) -> list[Point]:
    if chart.is_scatter:
        return [Point(row[chart.x], row[chart.y], row.get(f"{chart.y}_stderr", 0.0), 1) for row in rows]
    return [
        _point(x, [row for row in rows if row[chart.x] == x], chart.y) for x in _ordered(row[chart.x] for row in rows)
    ]


def _point(x: Any, rows: list[Row], y: str) -> Point:
    if len(rows) == 1:
        return Point(x, rows[0][y], rows[0].get(f"{y}_stderr", 0.0), 1)
    logarithmic = y in _LOGARITHMIC and all(row[y] > 0 for row in rows)
    values = [log(row[y]) if logarithmic else row[y] for row in rows]
    mean = sum(values) / len(values)
    error = sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    if logarithmic:
        return Point(x, exp(mean), exp(mean) * error, len(values), exp(error))
    return Point(x, mean, error, len(values))


def _cell(point: Point | None) -> str:
    if point is None:
        return ""
    return f"{point.mean:.4g} {point.spread}".rstrip()


def _ordered(values: Iterable[Any]) -> list[Any]:
    """Each value once: numbers ascending, names in order of appearance."""
    found = list(dict.fromkeys(values))
    return sorted(found) if all(map(_is_number, found)) else found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(x: Any) -> str:
    return f"{x:.4g}" if _is_number(x) else {True: "yes", False: "no"}.get(x, str(x))
