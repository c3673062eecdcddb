"""Divergence against its definition in f64, whole and stored."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import rkf
from rkf.cli import cli
from rkf.errors import CorruptError, UsageError
from rkf.eval import reference
from rkf.eval.distributions import DRAWS, TOP, Sampled, Whole, log_softmax
from rkf.eval.divergence import described, divergence, sampled, windows_of
from rkf.eval.perplexity import scored_logits
from rkf.runtime.model import Model
from rkf.text.tokenizer import Tokenizer
from tests.runtime import tiny
from tests.runtime.numpy_backend import NumpyBackend

CONFIG = tiny.config()
WEIGHTS = tiny.weights(CONFIG)
OTHER = {name: data + 0.02 for name, data in WEIGHTS.items()}
TEXT = "\n".join(tiny.CORPUS) * 3


@pytest.fixture
def file(tmp_path):
    return tiny.write(tmp_path / "tiny.rkf", CONFIG, WEIGHTS)


def model(file, weights):
    container = rkf.open(file)
    return Model(container, NumpyBackend(CONFIG, weights), Tokenizer(container.blob("tokenizer.json"), CONFIG))


def slow(dense, other, ctx, windows):
    """KL(dense || other) and agreement, f64[n] each, by torch in f64 over whole windows."""
    kld, same = [], []
    ids = dense.tokenizer.encode(TEXT)
    for start in range(0, windows * ctx, ctx):
        p, q = (
            torch.log_softmax(torch.from_numpy(m.logits(ids[start : start + ctx]).astype(np.float64)), -1)
            for m in (dense, other)
        )
        kld.append((p.exp() * (p - q)).sum(-1)[ctx // 2 : -1])
        same.append((p.argmax(-1) == q.argmax(-1))[ctx // 2 : -1])
    return torch.cat(kld).numpy(), torch.cat(same).double().numpy()


@pytest.mark.parametrize(("ctx", "windows"), [(16, 2), (17, 3), (64, 1)])
def test_equals_its_definition(file, ctx, windows):
    with model(file, WEIGHTS) as dense, model(file, OTHER) as other:
        result = divergence(other, windows_of(dense, TEXT, ctx=ctx, windows=windows))
        kld, same = slow(dense, other, ctx, windows)
    assert result["tokens"] == len(kld)
    for key, expected in (
        ("kld", kld.mean()),
        ("kld_stderr", kld.std(ddof=1) / np.sqrt(len(kld))),
        ("kld_median", np.median(kld)),
        ("kld_p99", np.quantile(kld, 0.99)),
        ("kld_max", kld.max()),
        ("top1", same.mean()),
    ):
        assert result[key] == pytest.approx(expected, rel=1e-4), key
    assert result["ppl_ratio"] == pytest.approx(result["ppl"] / result["ppl_reference"])


def test_a_model_does_not_differ_from_itself(file):
    with model(file, WEIGHTS) as dense:
        result = divergence(dense, windows_of(dense, TEXT, ctx=16))
    assert abs(result["kld"]) < 1e-6
    assert result["top1"] == result["ppl_ratio"] == 1
    assert 0 < result["noise_floor"] < 1e-3


def test_draws_from_the_tail_are_right_on_average():
    random = np.random.Generator(np.random.Philox(3))
    p, q = (log_softmax(random.normal(0, 2, (40, 1000)).astype(np.float32)) for _ in range(2))
    whole = Whole(p).divergence(q)
    estimates = np.array([Sampled.of(Whole(p), seed).divergence(q) for seed in range(200)])
    stderr = estimates.std(axis=0) / np.sqrt(len(estimates))
    assert np.all(np.abs(estimates.mean(axis=0) - whole) < 5 * stderr)
    assert np.array_equal(Sampled.of(Whole(p), 0).likeliest, p.argmax(axis=1))


def test_a_distribution_without_a_tail_needs_no_draws():
    logits = np.zeros((2, 30), np.float32)
    logits[:, 4] = 200
    whole = Whole(log_softmax(logits))
    flat = log_softmax(logits / 400)
    np.testing.assert_allclose(Sampled.of(whole, 0).divergence(flat), whole.divergence(flat))


def test_a_stored_reference_comes_back_and_is_small(file, tmp_path):
    with model(file, WEIGHTS) as dense, model(file, OTHER) as other:
        windows = [sampled(w, n) for n, w in enumerate(windows_of(dense, TEXT, ctx=64))]
        reference.write(tmp_path / "a.kld", windows)
        again = reference.read(tmp_path / "a.kld")
        assert divergence(other, again) == divergence(other, windows)
    stored = sum(a.nbytes for w in again for a in (w.distribution.ids, w.distribution.log_p, w.target))
    scored = sum(len(w.target) for w in again)
    assert stored / scored == 8 * (TOP + DRAWS) + 4
    assert (tmp_path / "a.kld").stat().st_size < 200 * scored + 2000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.kld")
    for path in (tmp_path / "a.kld", tmp_path, Path("/dev/zero")):
        with pytest.raises(UsageError, match="expected a regular file"):
            reference.read(path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04 not a zip"])
def test_another_file_is_no_reference(tmp_path, content):
    (tmp_path / "a.kld").write_bytes(content)
    with pytest.raises(CorruptError, match="not a reference"):
        reference.read(tmp_path / "a.kld")


def test_a_window_longer_than_the_context_is_refused(file):
    with model(file, WEIGHTS) as dense, pytest.raises(UsageError, match="ctx"):
        next(windows_of(dense, TEXT, ctx=257))


@pytest.mark.parametrize("stored", [False, True])
def test_another_vocabulary_is_refused(file, tmp_path, stored):
    more = tiny.config(vocab_size=CONFIG.vocab_size + 100)
    path = tiny.write(tmp_path / "more.rkf", more, tiny.weights(more))
    with rkf.load(file, exact=True) as smaller, rkf.load(path, exact=True) as larger:
        common = next(windows_of(larger, TEXT, ctx=16))
        ours = [described(common.ids, scored_logits(each, common.ids)) for each in (larger, smaller)]
        ours = [sampled(window, 0) for window in ours] if stored else ours
        for window, own, other in zip(ours, (larger, smaller), (smaller, larger), strict=True):
            assert abs(divergence(own, [window])["kld"]) < 1e-3
            if own is larger or not stored:  # a sample does not show how many tokens it leaves out
                with pytest.raises(UsageError, match=f"than the model's {other.config.vocab_size} tokens"):
                    divergence(other, [window])
        unknown = replace(ours[1], ids=np.full(16, more.vocab_size - 1))
        with pytest.raises(UsageError, match="another vocabulary"):
            divergence(smaller, [unknown])


def test_the_command_takes_a_model_and_then_its_stored_predictions(file, tmp_path):
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    saved = str(tmp_path / "saved.kld")
    command = ["eval", "kld", str(file), "--json", "--reference"]
    text = ["--text", str(tmp_path / "text"), "--ctx", "32", "--save", saved]
    live = CliRunner().invoke(cli, [*command, str(file), *text])
    assert live.exit_code == 0, live.output
    stored = CliRunner().invoke(cli, [*command, saved])
    assert stored.exit_code == 0, stored.output
    for result in (json.loads(live.stdout), json.loads(stored.stdout)):
        assert abs(result["kld"]) < 1e-3
        assert result["top1"] > 0.9


def test_a_reference_is_not_written_over_another_unasked(file, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "a.kld").write_bytes(b"here already")
    command = ["eval", "kld", file, "--reference", file, "--text", tmp_path / "text", "--ctx", "16", "--windows", "2"]
    command = [*map(str, command), "--save", str(tmp_path / "a.kld")]
    refused = CliRunner().invoke(cli, command)
    assert refused.exit_code == 2
    assert "exists already" in refused.output
    assert CliRunner().invoke(cli, [*command, "--force"]).exit_code == 0
    assert len(reference.read(tmp_path / "a.kld")) == 2
