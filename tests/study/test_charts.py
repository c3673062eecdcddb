"""Rows to points, tables and figures."""

from dataclasses import replace
from math import exp, sqrt

import pytest

from rkf.study.charts import Chart, lines, svg, table

ROWS = [
    {"change": "b", "where": "all", "seed": 0, "ppl_ratio": exp(1), "error": 0.1, "kld": 0.5},
    {"change": "b", "where": "all", "seed": 1, "ppl_ratio": exp(3), "error": 0.2, "kld": 0.7},
    {
        "change": "a",
        "where": "late",
        "seed": None,
        "ppl_ratio": 1.5,
        "ppl_ratio_stderr": 0.25,
        "error": 0.3,
        "kld": 0.9,
    },
]


def test_seeds_become_mean_and_standard_error():
    found = lines(Chart("n", "t", ROWS, x="change", series="where"))
    assert list(found) == ["all", "late"]
    (point,) = found["all"]
    assert point.mean == pytest.approx(exp(2)) and point.trials == 2  # the geometric mean of a ratio
    assert point.error == pytest.approx(exp(2) * sqrt(2) / sqrt(2))  # deviation of 1 and 3, over the root of two
    assert point.bars == pytest.approx((exp(2) - exp(1), exp(3) - exp(2)))
    assert found["late"][0].error == 0.25  # one trial: the error over its tokens


def test_tables_have_a_line_for_each_x():
    assert table(Chart("n", "t", ROWS, x="change", series="where")) == [
        ["change", "where all", "where late"],
        ["b", "7.389 ×÷ 2.7", ""],
        ["a", "", "1.5 ± 0.2"],
    ]


def test_figures_are_the_same_bytes_again():
    for chart in (
        Chart("n", "t", ROWS, x="change", series="where"),
        Chart("m", "t", ROWS, x="error", series="where", y="kld"),
    ):
        assert svg(chart) == svg(chart)
        assert "<svg" in svg(chart)


def test_panels_share_a_figure_and_keep_their_titles():
    chart = Chart("n", "one", ROWS, x="change", series="where")
    found = svg(chart, replace(chart, title="two"))
    assert "one" in found and "two" in found
    assert found.count("perplexity relative to the reference") == 1  # the y axis is labelled once
