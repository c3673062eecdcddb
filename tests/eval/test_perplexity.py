"""Perplexity against its definition, computed the slow way."""

import numpy as np
import pytest
import torch

import rkf
from rkf.errors import SemanticsError, UsageError
from rkf.eval.divergence import windows_of
from rkf.eval.perplexity import finite, negative_log_likelihood, perplexity, summary
from rkf.runtime.model import Model
from rkf.text.tokenizer import Tokenizer
from tests.runtime import tiny
from tests.runtime.numpy_backend import NumpyBackend

CONFIG = tiny.config()
WEIGHTS = tiny.weights(CONFIG)
TEXT = "\n".join(tiny.CORPUS) * 3


def model(tmp_path, config=CONFIG, weights=WEIGHTS):
    container = rkf.open(tiny.write(tmp_path / "tiny.rkf", config, WEIGHTS))
    tokenizer = Tokenizer(container.blob("tokenizer.json"), config)
    return Model(container, NumpyBackend(config, weights), tokenizer)


def slow(ready, ids, ctx, windows, bos=None):
    """The mean over every scored token, one window and one token at a time, by torch in f64."""
    losses = []
    for start in range(0, windows * ctx, ctx):
        window = list(ids[start : start + ctx])
        if bos is not None:
            window[0] = bos
        logits = torch.from_numpy(ready.logits(window).astype(np.float64))
        for position in range(ctx // 2, ctx - 1):
            losses.append(-torch.log_softmax(logits[position], -1)[window[position + 1]].item())
    losses = np.array(losses)
    ppl = np.exp(losses.mean())
    return ppl, ppl * losses.std(ddof=1) / np.sqrt(len(losses)), len(losses)


@pytest.mark.parametrize(("ctx", "windows"), [(16, None), (16, 2), (17, 3), (64, None)])
@pytest.mark.parametrize("bos", [None, 1])
def test_equals_its_definition(tmp_path, ctx, windows, bos):
    with model(tmp_path, tiny.config(add_bos=bos is not None)) as ready:
        ids = ready.tokenizer.encode(TEXT)
        seen = []
        result = perplexity(ready, TEXT, ctx=ctx, windows=windows, progress=lambda *at: seen.append(at))
        number = windows or len(ids) // ctx
        ppl, stderr, tokens = slow(ready, ids, ctx, number, bos)
        assert result["tokens"] == tokens == number * (ctx - 1 - ctx // 2)
        assert result["ppl"] == pytest.approx(ppl, rel=1e-5)
        assert result["ppl_stderr"] == pytest.approx(stderr, rel=1e-5)
        assert seen == [(n, number) for n in range(1, number + 1)]


def test_special_tokens_and_line_breaks_in_a_text_are_text(tmp_path):
    """As for llama-perplexity: a text is what its bytes say."""
    text = "he said <|im_end|> twice\r\n" * 20
    with model(tmp_path) as ready:
        ids = ready.tokenizer.encode(text, special=False)
        assert ready.tokenizer.decode(ids) == text and not {1, 2} & set(ids)
        assert perplexity(ready, text, ctx=16)["tokens"] == len(ids) // 16 * 7
        assert [id for window in windows_of(ready, text, ctx=16) for id in window.ids] == ids[: len(ids) // 16 * 16]


def test_likelihood_of_huge_logits_stays_finite():
    logits = np.array([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], np.float32)
    losses = negative_log_likelihood(logits, np.array([2, 1]))
    np.testing.assert_allclose(losses, [2e4, np.log(3)])


def test_no_figure_hides_logits_that_are_not_finite():
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(SemanticsError, match="not finite"):
            finite(np.array([[0, bad]], np.float32))
    with pytest.raises(SemanticsError, match="too much for a perplexity"):
        summary(np.array([800.0, 900.0]))


def test_logits_that_are_not_finite_are_those_of_a_file(tmp_path):
    bad = WEIGHTS | {"model.norm.weight": WEIGHTS["model.norm.weight"] * np.float32(np.nan)}
    asks = {
        "the model's logits": lambda ready: perplexity(ready, TEXT, ctx=16),
        "the largest logit": lambda ready: ready.generate("The", max_tokens=2),
    }
    for number, (problem, ask) in enumerate(asks.items()):
        (folder := tmp_path / str(number)).mkdir()
        with pytest.raises(SemanticsError, match=rf"tiny\.rkf: {problem}"), model(folder, weights=bad) as ready:
            ask(ready)


@pytest.mark.parametrize(("ctx", "windows"), [(3, None), (257, None), (16, 0)])
def test_options_out_of_range_are_refused(tmp_path, ctx, windows):
    with model(tmp_path) as ready, pytest.raises(UsageError, match="expected"):
        perplexity(ready, TEXT, ctx=ctx, windows=windows)


def test_a_context_too_short_for_any_window_is_named(tmp_path):
    with model(tmp_path, tiny.config(context_length=3)) as ready:
        for measure in (perplexity, lambda *asked: list(windows_of(*asked))):
            with pytest.raises(UsageError, match="context of 3 tokens is too short"):
                measure(ready, TEXT)


def test_a_text_shorter_than_a_window_is_refused(tmp_path):
    with model(tmp_path) as ready, pytest.raises(UsageError, match="at least one window of 16"):
        perplexity(ready, "The capital", ctx=16)
