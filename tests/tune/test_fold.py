"""Values built into a file: by `fold`, and in one step by `rkf convert --tune`."""

import subprocess
import sys
from time import monotonic, sleep

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open

import rkf
from rkf.cli import cli
from rkf.cluster.recipe import Rule
from rkf.errors import OutputError
from rkf.file.fold import fold
from rkf.file.values import write_values
from rkf.file.verify import verify
from rkf.format.matrix import Affine, MatrixValues
from rkf.tune import tuning
from tests.runtime import tiny
from tests.runtime.files import write_model
from tests.runtime.test_numpy_backend import reference

CONFIG = tiny.config(context_length=48)
NAME = "model.layers.0.mlp.up_proj.weight"


def test_a_folded_file_is_the_model_with_its_values(tmp_path):
    model, values, out = (tmp_path / name for name in ("m.rkf", "v.rkv", "out.rkf"))
    write_model(model, CONFIG, tiny.weights(CONFIG), Rule(k=8, exceptions=0.01))
    with rkf.open(model) as container:
        old = container.values(NAME)
        a = np.linspace(0.5, 2, CONFIG.intermediate_size, dtype=np.float32)
        changed = MatrixValues(
            old.centroids * np.float32(2), Affine("row", None, a), old.exceptions, old.exceptions_dtype
        )
        write_values(values, container, {NAME: changed})
    fold(model, values, out, provenance={"tuned": {"steps": 3}})
    with rkf.open(out) as found, rkf.open(model, values=values) as wanted:
        assert found.ranks_id == wanted.ranks_id and found.dense_id == wanted.dense_id
        assert found.provenance["tuned"] == {"steps": 3}
        assert found.blob("tokenizer.json") == wanted.blob("tokenizer.json")
        for name in wanted.tensors:
            assert np.array_equal(found.decode(name), wanted.decode(name))
    assert verify(out).clustered > 0  # verify raises for a bad file
    with pytest.raises(OutputError, match="the output is the input"):
        fold(model, values, model, force=True)


@pytest.fixture
def source(tmp_path):
    """A checkpoint."""
    folder = tmp_path / "tiny"
    reference(CONFIG).save_pretrained(folder)
    tiny.byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE)
    return folder


def arguments(source, out, *more):
    return ["convert", str(source), str(out), "--recipe", "paper-exceptions", "--k", "8", *more]


def test_convert_and_tune_in_one_go(tmp_path, source, monkeypatch):
    monkeypatch.setattr(tuning, "SEQUENCES", 6)
    out = tmp_path / "out.rkf"
    own = tmp_path / "out.rkf.tuned" / "notes"  # a file of the user's
    own.parent.mkdir()
    own.write_text("mine")

    def convert(path, *more):
        return CliRunner().invoke(cli, arguments(source, path, *more))

    done = convert(out, "--tune", "0.06")
    assert done.exit_code == 0, done.stderr
    assert "recovered" in done.stderr
    assert convert(tmp_path / "plain.rkf").exit_code == 0
    with rkf.open(out) as tuned, rkf.open(tmp_path / "plain.rkf") as plain:
        assert tuned.ranks_id == plain.ranks_id
        assert tuned.provenance["tuned"]["kld"] <= tuned.provenance["tuned"]["kld_before"]
        assert not np.array_equal(tuned.decode(NAME), plain.decode(NAME))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.rkf", "out.rkf.tuned", "plain.rkf", "tiny"]
    assert [path.name for path in own.parent.iterdir()] == ["notes"]
    assert convert(out, "--tune", "0.02").exit_code == 2  # the output exists


def test_the_source_is_not_overwritten(source):
    weights = source / "model.safetensors"
    before = weights.read_bytes()
    done = CliRunner().invoke(cli, arguments(source, weights, "--tune", "0.02", "--force"))
    assert "the output is the input" in done.output
    assert weights.read_bytes() == before
    assert not weights.with_name("model.safetensors.tuned").exists()


def test_an_earlier_output_among_the_sources_files_is_no_source(source, monkeypatch):
    monkeypatch.setattr(tuning, "SEQUENCES", 6)
    out = source / "model.rkf"
    out.write_bytes(b"of an earlier conversion")
    done = CliRunner().invoke(cli, arguments(source, out, "--calibrate", "none", "--tune", "0.02", "--force"))
    assert done.exit_code == 0, done.output
    with rkf.open(out) as tuned:
        assert "tuned" in tuned.provenance


def test_a_killed_conversion_goes_on_with_what_it_has_learned(tmp_path, source):
    out = tmp_path / "out.rkf"
    command = [sys.executable, "-m", "rkf", *arguments(source, out, "--calibrate", "none", "--tune")]
    learned = tmp_path / "out.rkf.tuned" / "values.rkv.tuning" / "state.safetensors"
    killed = subprocess.Popen([*command, "5"], stderr=subprocess.DEVNULL)
    try:
        deadline = monotonic() + 300  # a busy machine is slow to start; it is killed as soon as it has learned
        while not learned.exists() and monotonic() < deadline:
            sleep(0.05)
    finally:
        killed.kill()
        killed.wait()
    with safe_open(learned, "pt") as state:
        steps = int(state.metadata()["step"])
    assert steps > 0 and not out.exists()
    done = subprocess.run([*command, "0.0001", "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with rkf.open(out) as tuned:
        assert tuned.provenance["tuned"]["steps"] == steps
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.rkf", "tiny"]


def test_no_file_that_the_conversion_reads_is_overwritten(tmp_path, source):
    text = tmp_path / "text.txt"
    text.write_text("some text", encoding="utf-8")
    done = CliRunner().invoke(
        cli, ["convert", str(source), str(text), "--k", "8", "--calibrate", str(text), "--tune", "0.02", "--force"]
    )
    assert "the output is the input" in done.output
    assert text.read_text(encoding="utf-8") == "some text"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt", "tiny"]


def test_a_size_holds_with_tuning(tmp_path, source, monkeypatch):
    monkeypatch.setattr(tuning, "SEQUENCES", 6)
    out = tmp_path / "out.rkf"
    command = ["convert", str(source), str(out), "--calibrate", "none"]
    assert CliRunner().invoke(cli, [*command, "--k", "16"]).exit_code == 0
    size = out.stat().st_size + 4096
    done = CliRunner().invoke(cli, [*command, "--size", str(size), "--tune", "0.02", "--force"])
    assert done.exit_code == 0, done.output
    assert size - 8192 < out.stat().st_size <= size


def test_what_cannot_be_converted_leaves_nothing(tmp_path, source):
    command = ["convert", str(source), "--calibrate", "none", "--tune", "1"]
    for out, options in ((tmp_path / "out.rkf", ["--size", "1"]), (tmp_path / "none" / "out.rkf", ["--k", "16"])):
        done = CliRunner().invoke(cli, [*command[:2], str(out), *command[2:], *options])
        assert done.exit_code in (1, 2) and done.stderr.count("\n") <= 3, done.output
        assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
