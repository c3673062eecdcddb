"""The default model end to end: its answers, and its agreement with transformers' version."""

import os
import subprocess
import sys

import pytest
import torch
import transformers

import rkf
from rkf.cache import cache_dir

QUESTION = "What is the capital of France?"
TOKENS = 64


@pytest.mark.parametrize("k", [16, 32, 64])
def test_it_knows_the_capital_of_france(converted, k):
    with rkf.load(converted(k=k)) as model:
        assert "Paris" in model.generate(QUESTION)


def test_as_a_newcomer_types_it(checkpoint, tmp_path):
    """A new cache with only the checkpoint: the first run converts, compiles and says so; the second does neither."""
    (tmp_path / "checkpoints").symlink_to(cache_dir() / "checkpoints")
    command = [sys.executable, "-m", "rkf", "run", "--prompt", QUESTION]
    environment = os.environ | {"RKF_CACHE": str(tmp_path)}
    first, again = (
        subprocess.run(command, capture_output=True, text=True, check=False, env=environment) for _ in range(2)
    )
    assert first.returncode == again.returncode == 0, first.stderr
    assert "Paris" in first.stdout
    assert "converting" in first.stderr
    assert (again.stdout, again.stderr) == (first.stdout, "")


@pytest.fixture(scope="module")
def reference(checkpoint):
    """transformers' own model of the checkpoint: a GGUF file, dequantised to f32 by transformers' loader."""
    folder, options = (checkpoint, {}) if checkpoint.is_dir() else (checkpoint.parent, {"gguf_file": checkpoint.name})
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.mark.parametrize("prompt", ["The three primary colours are", "def fibonacci(n):\n"])
def test_greedy_text_equals_transformers_token_by_token(converted, reference, prompt):
    with rkf.load(converted("dense"), exact=True) as model:
        stream = model.stream(prompt, raw=True, max_tokens=TOKENS)
        text = "".join(stream)
        ids = model.tokenizer.encode(prompt)
    with torch.no_grad():
        theirs = reference.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=2)
    assert stream.ids == theirs[0].tolist()
    assert len(stream.ids) == len(ids) + TOKENS
    assert text == model.tokenizer.decode(stream.ids)[len(prompt) :]
