"""Every verb on a tiny checkpoint, in the usual order: convert, inspect, measure, pack, export, and back."""

import json

import pytest
from click.testing import CliRunner

from rkf.cli import cli
from tests.runtime import tiny
from tests.runtime.test_numpy_backend import reference

CONFIG = tiny.config()
TEXT = "\n".join(tiny.CORPUS) * 4


def rkf(*arguments, code=0):
    """The output of a command run in this process; test_run.py and test_errors.py start new processes."""
    done = CliRunner().invoke(cli, list(map(str, arguments)), prog_name="rkf")
    assert done.exit_code == code, done.stderr
    return done.stdout


def rkf_json(*arguments):
    return json.loads(rkf(*arguments, "--json"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder in Hugging Face's layout."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    reference(CONFIG).save_pretrained(folder)
    tiny.byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    path = checkpoint.parent / "k16.rkf"
    rkf("convert", checkpoint, path, "--k", 16, "--calibrate", "none")
    return path


@pytest.fixture(scope="module")
def text(checkpoint):
    path = checkpoint.parent / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_a_rehearsal_tells_the_size_and_writes_nothing(checkpoint, model, tmp_path):
    out = tmp_path / "out.rkf"
    table = rkf("convert", checkpoint, out, "--k", 16, "--calibrate", "none", "--dry-run")
    assert f"{model.stat().st_size:,}" in table.splitlines()[-1]
    assert not out.exists()


def test_an_output_is_overwritten_only_by_force(checkpoint, model):
    before = model.read_bytes()
    rkf("convert", checkpoint, model, "--k", 16, "--calibrate", "none", code=2)
    rkf("convert", checkpoint, model, "--k", 16, "--calibrate", "none", "--workers", 1, "--force")
    assert model.read_bytes() == before


def test_footprint_adds_up(checkpoint, model):
    ledger = rkf_json("footprint", model, checkpoint)
    assert ledger["file_bytes"] == sum(ledger["sections"].values()) == model.stat().st_size
    assert 4 < ledger["clustered_bits_per_weight"] < ledger["bits_per_weight"]
    assert ledger["ratio"] == ledger["source_bytes"] / ledger["file_bytes"]
    assert "ranks_4bit" in rkf("footprint", model)


def test_verify_and_diff(checkpoint, model, tmp_path):
    assert "valid" in rkf("verify", model)
    other = tmp_path / "k32.rkf"
    rkf("convert", checkpoint, other, "--k", 32, "--calibrate", "none")
    assert rkf_json("diff", model, model)["identical"] is True
    difference = rkf_json("diff", model, other)
    assert difference["same_dense"] is True
    assert difference["same_ranks"] is False
    assert "relative_rms" in rkf("diff", model, other)


def test_pack_and_unpack(model, tmp_path):
    packed, back = tmp_path / "packed.rkf", tmp_path / "back.rkf"
    rkf("pack", model, packed)
    rkf("unpack", packed, back)
    assert back.read_bytes() == model.read_bytes()
    assert rkf("run", packed, "--prompt", "The") == rkf("run", model, "--prompt", "The")


def test_eval_ppl(model, text):
    result = rkf_json("eval", "ppl", model, "--text", text, "--ctx", 32, "--windows", 2)
    assert set(result) >= {"ppl", "ppl_stderr", "tokens"}
    assert result["tokens"] == 2 * 15
    assert f"{result['ppl']:.4f}" in rkf("eval", "ppl", model, "--text", text, "--ctx", 32, "--windows", 2)
    rkf("eval", "ppl", model, "--text", text, "--ctx", 3, code=2)
    binary = text.with_suffix(".bin")
    binary.write_bytes(b"\xff\xfe")
    rkf("eval", "ppl", model, "--text", binary, code=2)


def test_bench(model):
    result = rkf_json("bench", model, "--threads", 1, "--prefill", 16, "--decode", 4)
    assert set(result) >= {"prefill_tok_s", "decode_tok_s", "load_s", "first_token_s", "rss_bytes"}
    assert all(value > 0 for value in result.values())
    assert result["load_s"] < result["first_token_s"]
    options = ["--prefill", 16, "--decode", 4, "--batch", 3, "--kv-cache", "int8", "--bits", 2]
    assert "3 sequences together" in rkf("bench", model, *options)
    assert "500 sequences" in rkf("bench", model, "--prefill", 4, "--decode", 2, "--batch", 500)  # more than tokens
    rkf("bench", model, "--prefill", 5000, code=2)


@pytest.mark.parametrize(("form", "error"), [("hf", 0), ("gguf", 1e-3)])  # GGUF is written in f16
def test_export_and_convert_again(model, tmp_path, form, error):
    exported, again = tmp_path / f"model.{form}", tmp_path / "again.rkf"
    rkf("export", form, model, exported)
    rkf("convert", exported, again, "--recipe", "dense")
    changes = rkf_json("diff", model, again)["tensors"]
    assert max(change.get("relative_rms", 0) for change in changes.values()) <= error
    assert rkf("run", again, "--prompt", "The", "--max-tokens", 8)
