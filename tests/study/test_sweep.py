"""A sweep of a tiny checkpoint with one matrix that plain clustering ruins."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from rkf.cluster.recipe import Recipe
from rkf.converters.export import export_hf
from rkf.errors import UsageError
from rkf.study import sweep
from tests.runtime import tiny
from tests.runtime.files import write_model
from tests.study.conftest import CONFIG, TEXT

WEAK = "model.layers.1.mlp.up_proj.weight"


def weights():
    found = tiny.weights(CONFIG)
    found[WEAK][3, 5] = 8  # 40 deviations
    return found


def convert(out, *, recipe, k, calibrated):
    """Use the built-in recipes, except that one matrix has two values in the plain one."""
    rules = Recipe.load(recipe, CONFIG.program(weights()), k)

    def rule(name):
        found = rules.rule(name, weights()[name].shape)
        return replace(found, k=2) if (recipe, name) == ("paper", WEAK) else found

    write_model(out, CONFIG, weights(), rule)


def swept(out, **options):
    common = {"text": TEXT, "windows": 1, "ctx": 32, "threads": 1, "ks": (4, 16, 64)}
    return sweep(out, **{"convert": convert, "source": "tiny", "fingerprint": "f", **common, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    swept(out)
    return out


def trials(folder):
    return json.loads((folder / "results.json").read_text())["trials"]


def test_more_values_are_better(folder):
    kld = {(row["variant"], row["k"]): row["kld"] for row in trials(folder) if row["layer"] is None}
    assert set(kld) == {(variant, k) for variant in ("plain", "exceptions") for k in (4, 16, 64)}
    for variant in ("plain", "exceptions"):
        assert kld[variant, 64] < kld[variant, 16] < kld[variant, 4]


def test_the_matrix_that_collapses_is_found(folder):
    rows = trials(folder)
    assert [row["layer"] for row in rows if row["variant"] == "one plain" and not row["kind"]] == [0, 1]
    kinds = [row for row in rows if row["kind"]]
    assert {row["layer"] for row in kinds} == {1} and len(kinds) == 7 + 1
    (spared,) = [row for row in rows if row["variant"] == "all but one plain"]
    assert (spared["layer"], spared["kind"]) == (1, "up")
    matrices = json.loads((folder / "results.json").read_text())["matrices"]
    largest = max(matrices, key=lambda row: row["largest"])
    assert largest["name"] == WEAK and largest["largest"] > 20


def test_models_are_removed_and_the_report_is_there(folder):
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []
    assert len(re.findall("<svg", (folder / "report.html").read_text())) == len(list(folder.glob("*.svg"))) == 6


def test_it_goes_on_where_it_was_interrupted(tmp_path, folder):
    class Enough(Exception):
        pass

    def stop(trial, done, total):
        if "one-plain_k-16_layer-1" in trial.replace(" ", "-"):
            raise Enough

    with pytest.raises(Enough):
        swept(tmp_path, progress=stop)
    assert len(trials(tmp_path)) == 7
    swept(tmp_path)
    assert trials(tmp_path) == trials(folder)


def test_models_of_other_inputs_are_not_taken(tmp_path, folder):
    """A folder that the user owns is not removed either."""
    (tmp_path / "models").mkdir()

    def stop(trial, done, total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path, fingerprint="another", convert=another, progress=stop)
    (tmp_path / "results.json").unlink()
    swept(tmp_path)
    assert trials(tmp_path) == trials(folder)
    assert (tmp_path / "models").is_dir()


def another(out, *, recipe, k, calibrated):
    rules = Recipe.load(recipe, CONFIG.program(weights()), k)
    write_model(out, CONFIG, tiny.weights(CONFIG, seed=1), lambda name: rules.rule(name, weights()[name].shape))


def test_a_sweep_has_one_calibration(tmp_path):
    swept(tmp_path, ks=(8,))
    swept(tmp_path, ks=(8,), calibration="self")
    assert [row["variant"] for row in trials(tmp_path)] == ["plain", "exceptions", "calibrated"]
    assert " --k 8 --calibrate self" in (tmp_path / "report.md").read_text()
    with pytest.raises(UsageError, match="choose another folder"):
        swept(tmp_path, ks=(8,), calibration="hash of a text")
    swept(tmp_path / "a", ks=(8,), layers=[1], calibration="hash of a text")
    assert " --k 8 --calibrate FILE --layers 1" in (tmp_path / "a" / "report.md").read_text()
    for other in ("hash of another", "self", None):
        with pytest.raises(UsageError, match="choose another folder"):
            swept(tmp_path / "a", ks=(8,), calibration=other)


def test_as_a_command(tmp_path):
    export_hf(write_model(tmp_path / "dense.rkf", CONFIG, weights()), tmp_path / "checkpoint")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "other.txt").write_text(TEXT * 2, encoding="utf-8")
    options = ["--text", tmp_path / "text.txt", "--windows", 1, "--ctx", 32, "--k", "8", "--json"]
    command = [sys.executable, "-m", "rkf", "study", "sweep", tmp_path / "checkpoint", tmp_path / "out", *options]
    command += ["--calibrate", tmp_path / "text.txt"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    variants = [(row["variant"], row["k"]) for row in json.loads(done.stdout)]
    assert variants == [("plain", 8), ("exceptions", 8), ("calibrated", 8)]
    command[-1] = tmp_path / "other.txt"
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "choose another folder" in done.stderr
    done = subprocess.run([*map(str, command), "--reference", "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "omit --reference" in done.stderr
