"""Studies of a tiny model end to end: the files they leave, and the cost of an interruption."""

import csv
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

import rkf
from rkf.cli import cli
from rkf.errors import CorruptError, UsageError
from rkf.file import kept_json
from rkf.study import STUDIES, records
from tests.runtime import tiny
from tests.runtime.files import write_model
from tests.study.conftest import CONFIG, TEXT


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_leaves_results_values_and_a_report(studied, name):
    folder = studied(name)
    stored = json.loads((folder / "results.json").read_text())
    rows = stored["trials"]
    assert len({row["trial"] for row in rows}) == len(rows) > 10
    assert {0, 1} <= {row["seed"] for row in rows} <= {None, 0, 1}
    assert all(row["ppl"] > 1 and np.isfinite(row["kld"]) for row in rows)
    with (folder / "results.csv").open(newline="") as file:
        assert [row["trial"] for row in csv.DictReader(file)] == [row["trial"] for row in rows]
    figures = {path.name for path in folder.glob("*.svg")}
    assert set(re.findall(r"\((\S+\.svg)\)", (folder / "report.md").read_text())) == figures
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == len(figures) and not re.search(r'(src|href)="(?!#)', page)
    assert {path.stem for path in (folder / "values").glob("*.rkv")} == {row["trial"] for row in rows}


def test_a_changed_model_can_be_talked_to(model, studied):
    values = studied("scramble") / "values" / "change-whole_restored-True_seed-0.rkv"
    with rkf.load(model) as before, rkf.load(model, values=values) as after:
        assert before.generate("The river", max_tokens=8) != after.generate("The river", max_tokens=8)


def test_scrambling_keeps_values_and_counts(model, studied):
    path = studied("scramble") / "values" / "change-whole_restored-False_seed-0.rkv"
    with rkf.open(model) as old, rkf.open(model, values=path) as new:
        assert (old.order, new.order) == ("ascending", "none")
        for name in clustered(old):
            np.testing.assert_array_equal(old.counts(name), new.counts(name))
            np.testing.assert_array_equal(old.values(name).exceptions, new.values(name).exceptions)
            before, after = old.values(name).centroids, new.values(name).centroids
            np.testing.assert_array_equal(before, np.sort(after))
            assert name.startswith("model.layers.") != np.array_equal(before, after)


def clustered(container):
    return [name for name, entry in container.tensors.items() if entry.kind == "clustered"]


def test_preserving_keeps_the_order(model, studied):
    for path in (studied("preserve") / "values").glob("*.rkv"):
        with rkf.open(model, values=path) as container:
            assert container.order == "ascending"


def test_only_what_a_trial_names_is_changed(model, studied):
    path = studied("scramble") / "values" / "change-whole_restored-True_kind-query_seed-0.rkv"
    with rkf.open(model) as old, rkf.open(model, values=path) as new:
        changed = [
            name
            for name in clustered(old)
            if not np.array_equal(old.values(name).centroids, new.values(name).centroids)
        ]
    assert changed == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]


def test_an_interruption_costs_nothing_and_seeds_extend(tmp_path, study, studied):
    class Enough(Exception):
        pass

    def stop(trial, done, total):
        if done == 5:
            raise Enough

    with pytest.raises(Enough):
        study("scramble", tmp_path, progress=stop)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "values").glob("*.rkv")}
    assert len(made) == 5
    study("scramble", tmp_path)
    study("scramble", tmp_path, seeds=2)
    assert made == {path: path.stat().st_mtime_ns for path in made}
    assert rows(tmp_path) == rows(studied("scramble"))
    for path in (tmp_path / "values").glob("*.rkv"):
        assert path.read_bytes() == (studied("scramble") / "values" / path.name).read_bytes()


def test_a_table_that_a_killed_run_left_behind_its_results(tmp_path, study, studied):
    """The next run has no trial left, and once left the table as it was."""
    shutil.copytree(studied("scramble"), tmp_path, dirs_exist_ok=True)
    table, partial = tmp_path / "results.csv", tmp_path / ".results.csv.partial"
    whole = table.read_bytes()
    table.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    partial.write_bytes(b"trial")
    study("scramble", tmp_path, seeds=2)
    assert table.read_bytes() == whole and not partial.exists()


def rows(folder):
    return {row["trial"]: row for row in json.loads((folder / "results.json").read_text())["trials"]}


def test_what_does_not_fit_is_refused(tmp_path, model, study):
    with pytest.raises(UsageError, match="expected one of scramble"):
        study("shake", tmp_path)
    with pytest.raises(UsageError, match="expected some of 0 to 1, got"):
        study("scramble", tmp_path, layers=[1, 2])
    other = write_model(tmp_path / "other.rkf", tiny.config(), tiny.weights(tiny.config()))
    with pytest.raises(UsageError, match="of the same dimensions"):
        study("scramble", tmp_path, reference=other)
    with pytest.raises(UsageError, match="at least one window"):
        study("scramble", tmp_path, text="short")
    (tmp_path / "other").mkdir()
    another = kept_json.sealed(records.KIND, {"fingerprint": "x", "trials": []})
    (tmp_path / "other" / "results.json").write_bytes(another)
    with pytest.raises(UsageError, match="another model, text, calibration or layers"):
        study("scramble", tmp_path / "other")
    (tmp_path / "other" / "results.json").write_text("{")
    with pytest.raises(CorruptError, match="not the results of a study"):
        study("scramble", tmp_path / "other")


def test_predictions_of_another_text_are_not_taken(tmp_path, study):
    """Both when the first trial was interrupted and when the results were removed to start again."""

    def stop(trial, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study("interpolate", tmp_path, text=TEXT[::-1], progress=stop)
    study("interpolate", tmp_path)
    study("interpolate", tmp_path / "alone")
    assert rows(tmp_path) == rows(tmp_path / "alone")


def test_divergence_is_from_the_reference(tmp_path, model, study):
    """With a dense source, the clustered model itself has a divergence, which is measured too."""
    dense = write_model(tmp_path / "dense.rkf", CONFIG, tiny.weights(CONFIG))
    study("interpolate", tmp_path / "out", reference=dense, layers=[1])
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["unchanged"]["kld"] > 0.01
    assert stored["ppl"] * stored["unchanged"]["ppl_ratio"] == pytest.approx(stored["unchanged"]["ppl"])


def test_the_text_is_not_replaced_by_the_report(tmp_path, model):
    for name in ("results.csv", "report.md"):
        text = tmp_path / name
        text.write_text(TEXT, encoding="utf-8")
        done = CliRunner().invoke(cli, ["study", "drift", str(model), str(tmp_path), "--text", str(text)])
        assert done.exit_code == 1 and f"the output is the input {name}" in done.output
        assert text.read_text(encoding="utf-8") == TEXT


def test_as_a_command(tmp_path, model):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    out, options = tmp_path / "out", ["--windows", 1, "--ctx", 32, "--seeds", 1, "--layers", "1-1"]
    command = [sys.executable, "-m", "rkf", "study", "interpolate", model, out, "--text", text, *options, "--json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == len(list((out / "values").iterdir()))
    command[command.index("1-1")] = "1-"
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "expected numbers from 0 to 9999 and ranges of them" in done.stderr
