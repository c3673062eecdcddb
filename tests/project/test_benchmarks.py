"""The benchmarks' own computations, on numbers small enough to check by hand."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import choices, nf4, peers, report, table
from benchmarks.quality import Bench
from rkf.calibrate.calibration import SHORT, Calibrate
from rkf.converters.pipeline import convert
from rkf.file.container import open_file
from tests.families.models import model_of, save

ROWS = [
    {"name": name, "bytes": size, "kld": kld, "kld_stderr": 0.0, "ppl_ratio": 1.0, "top1": 0.9}
    for name, size, kld in (
        ("rkf-80MB", 80e6, 0.1),
        ("peer", 90e6, 0.1),
        ("rkf-100MB", 100e6, 0.025),
        ("far", 5e8, 1e-4),
    )
]


@pytest.mark.parametrize("name", [path.stem for path in sorted(Path(report.__file__).parent.glob("*.py"))])
def test_all_that_a_benchmark_uses_is_there(name):
    try:
        importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        if error.name != "llama_cpp":  # of the peer's own environment
            raise


def test_ratios_lie_on_the_line_between_our_files():
    lines = report.ratios(ROWS).splitlines()
    assert lines[2:] == ["| peer | 0.50 x | 0.89 x |", "| far | - | - |"]
    assert [line.split()[1] for line in report.table(ROWS).splitlines()[2:]] == ["rkf-80MB", "peer", "rkf-100MB", "far"]


def test_a_plot_is_drawn(tmp_path):
    for model in ("small", "large"):
        (tmp_path / f"{model}.json").write_text(json.dumps({"text": {"models": ROWS}}))
    results = report.merged([tmp_path / "small.json", tmp_path / "large.json"])
    assert list(results) == ["small, text", "large, text"]
    report.draw(results, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_nf4_takes_the_nearest_level_of_each_block():
    scale = np.repeat(np.float32([2.0, 0.5]), nf4.BLOCK)
    exact = np.resize(nf4.LEVELS, 2 * nf4.BLOCK) * scale
    np.testing.assert_allclose(nf4.rounded(exact), exact, atol=1e-6)
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    error = nf4.rounded(weights) - weights
    assert 0.006 < np.mean(error**2) < 0.011  # about 0.0087 for a Gaussian


def test_items_hold_the_true_ending_at_their_label():
    words = [f"w{number}" for number in range(3000)]
    made = list(choices.items(" ".join(words), 50))
    assert len(made) == 50
    for number, item in enumerate(made):
        start = number * (choices.CONTEXT + choices.ENDING)
        expected = " ".join(words[start + choices.CONTEXT : start + choices.CONTEXT + choices.ENDING])
        assert item["endings"][item["label"]] == f" {expected}"
        assert len(set(item["endings"])) == choices.ENDINGS
    assert json.dumps(made) == json.dumps(list(choices.items(" ".join(words), 50)))
    assert len({item["label"] for item in made}) == choices.ENDINGS


@pytest.mark.parametrize("words", [0, 10])
def test_a_short_text_has_no_items(words):
    assert list(choices.items("word " * words, 5)) == []


def test_the_readme_has_the_stored_speeds():
    readme = (Path(report.__file__).parents[1] / "README.md").read_text()
    assert "\n".join(table.table(table.RESULTS)) in readme


def test_a_llama_bench_binary_is_a_peer(tmp_path):
    binary = tmp_path / "llama-bench"
    binary.write_text('#!/bin/sh\necho "$@" >> "$0.log"\necho \'[{"avg_ns": 2500000000}]\'\n')
    binary.chmod(0o755)
    opponent = peers.peer(f"{binary} -rtr 1", "m.gguf", 2, 100)
    assert [opponent.seconds(case) for case in ("prefill 512", "decode 16 0", "decode 16 64")] == [2.5, 2.5, 2.5]
    common = "-rtr 1 -m m.gguf -t 2 -r 1 -o json"
    calls = ["--help", f"{common} -p 512 -n 0", f"{common} -p 0 -n 16", f"{common} -p 0 -n 16 -d 64"]
    assert Path(f"{binary}.log").read_text().splitlines() == calls


def test_all_our_files_have_one_calibration(tmp_path, monkeypatch):
    monkeypatch.setattr("rkf.calibrate.calibration.CTX", 16)
    source = save(model_of("gemma3"), tmp_path / "model")
    kept = Bench(source, tmp_path / "work", tmp_path, SHORT)._calibration()
    convert(source, tmp_path / "x.rkf", bpw=5, calibrate=Calibrate(kept))
    with open_file(tmp_path / "x.rkf") as container:
        assert container.provenance["calibration"]["origin"] == "calibration.npz"
