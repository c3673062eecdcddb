"""Multiple choice against log-likelihoods computed the slow way."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import rkf
from rkf.cli import cli
from rkf.errors import UsageError
from rkf.eval.choices import Item, _scores, choices, parse
from rkf.runtime.model import Model
from rkf.text.tokenizer import Tokenizer
from tests.runtime import tiny
from tests.runtime.numpy_backend import NumpyBackend

CONFIG = tiny.config()
WEIGHTS = tiny.weights(CONFIG)
WORDS = " ".join(tiny.CORPUS).split()
ITEMS = [
    Item(" ".join(WORDS[n : n + 5]), tuple(" " + " ".join(WORDS[m : m + 1 + m % 3]) for m in (n, n + 7, n + 2)), n % 3)
    for n in range(12)
]


@pytest.fixture
def file(tmp_path):
    return tiny.write(tmp_path / "tiny.rkf", CONFIG, WEIGHTS)


@pytest.fixture
def model(file):
    container = rkf.open(file)
    with Model(container, NumpyBackend(CONFIG, WEIGHTS), Tokenizer(container.blob("tokenizer.json"), CONFIG)) as ready:
        yield ready


def slow(ready, context, ending):
    """Log-likelihood per byte of an ending, with the whole text in one call."""
    ids, alone = ready.tokenizer.encode(context + ending), ready.tokenizer.encode(context)
    assert ids[: len(alone)] == alone
    log_p = torch.log_softmax(torch.from_numpy(ready.logits(ids).astype(np.float64)), -1)
    return sum(log_p[at - 1, ids[at]].item() for at in range(len(alone), len(ids))) / len(ending.encode())


def test_scores_equal_their_definition(model):
    for item in ITEMS:
        expected = [slow(model, item.context, ending) for ending in item.endings]
        assert _scores(model, item) == pytest.approx(expected, rel=1e-4)


def test_accuracy_counts_the_likeliest(model):
    seen = []
    result = choices(model, ITEMS, progress=lambda *at: seen.append(at))
    right = [
        int(np.argmax([slow(model, item.context, ending) for ending in item.endings])) == item.label for item in ITEMS
    ]
    assert result["accuracy"] == np.mean(right)
    assert result["accuracy_stderr"] == pytest.approx(np.std(right, ddof=1) / np.sqrt(len(right)))
    assert (result["items"], result["chance"]) == (12, pytest.approx(1 / 3))
    assert seen == [(n, 12) for n in range(1, 13)]


def test_an_ending_that_changes_the_contexts_last_token(model):
    """The ending's letters join with the context's, so all endings are scored from the last token that they share."""
    context = f"{WORDS[0]} {WORDS[1]}"
    ids, joined = model.tokenizer.encode(context[:-1]), model.tokenizer.encode(context)
    assert joined[: len(ids)] != ids
    log_p = torch.log_softmax(torch.from_numpy(model.logits(joined).astype(np.float64)), -1)
    expected = log_p[len(joined) - 2, joined[-1]].item()
    assert _scores(model, Item(context[:-1], (context[-1], " " + WORDS[1]), 0))[0] == pytest.approx(expected, rel=1e-4)


def test_nothing_before_an_ending(model):
    assert len(model.tokenizer.encode(WORDS[0])) == 1
    with pytest.raises(UsageError, match=r"^item 2: .*longer context"):
        choices(model, [ITEMS[0], Item(WORDS[0][:-1], (WORDS[0][-1], " " + WORDS[1]), 0)])


def test_the_command(file, tmp_path):
    lines = "\n\n".join(
        json.dumps({"context": i.context, "endings": i.endings, "label": i.label, "id": 1}) for i in ITEMS
    )
    (tmp_path / "items.jsonl").write_text(lines, encoding="utf-8")
    arguments = ["eval", "choices", str(file), str(tmp_path / "items.jsonl"), "--items", "5", "--exact"]
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["items"] == 5
    assert "accuracy" in CliRunner().invoke(cli, arguments).stdout


@pytest.mark.parametrize(
    "line",
    [
        "",
        "not JSON",
        "[]",
        '{"context": "a", "endings": ["b", "c"]}',
        '{"context": "a", "endings": ["b"], "label": 0}',
        '{"context": "a", "endings": ["b", ""], "label": 0}',
        '{"context": "a", "endings": ["b", 3], "label": 0}',
        '{"context": "", "endings": ["b", "c"], "label": 0}',
        '{"context": "a", "endings": ["b", "c"], "label": 2}',
        '{"context": "a", "endings": ["b", "c"], "label": true}',
    ],
)
def test_lines_that_are_no_items(line):
    with pytest.raises(UsageError, match=r"^questions"):
        parse(line, "questions")
