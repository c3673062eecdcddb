"""docs/paper.md matches its stored results, and its tunings are measured as it says."""

import json

import pytest

from benchmarks import paper_tuning
from benchmarks.paper import PAGE, page
from rkf.cluster.recipe import Rule
from tests.runtime import tiny
from tests.runtime.files import write_model

CONFIG = tiny.config(context_length=48)
TEXT = "\n".join(tiny.CORPUS) * 4


def test_the_page_is_made_of_the_stored_results():
    text, figures = page()
    assert PAGE.read_text(encoding="utf-8") == text, "`make paper` writes it anew"
    assert {path.name for path in PAGE.parent.joinpath("paper").rglob("*.svg")} == {path.name for path in figures}


def test_tunings_are_measured_and_kept(tmp_path):
    plan = paper_tuning.Plan({("K = 16", "matrix"): 0.01}, windows=2, ctx=32)
    converted = []

    def convert(out, options):
        converted.append(out.name)
        write_model(out, CONFIG, tiny.weights(CONFIG), None if "dense" in options else Rule(k=4))

    for _ in range(2):
        paper_tuning.tuning(tmp_path, plan, TEXT, 1, convert=convert)
    assert converted == ["dense.rkf", "K = 16.rkf"]
    before, after = json.loads((tmp_path / "results.json").read_text())["trials"]
    assert before["factors"] is None and after["steps"] > 0
    assert abs(before["ppl_ratio"] - 1) > 0.1
    half = {**after, "ppl_ratio": (before["ppl_ratio"] + 1) / 2, "kld": before["kld"] / 4}
    assert paper_tuning.recovered([before, after], half) == pytest.approx((0.5, 0.75))
