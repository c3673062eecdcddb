"""Tuning of models with experts, recurrent states, windows and sinks: every program learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import rkf
from rkf.cluster.recipe import Rule
from rkf.tune import tune
from tests.calibrate.small_models import OPTIONS, small_model
from tests.torch.program_files import write_program

RULE = Rule(k=4, exceptions=0.01)


# Factors of rows are learned in the same way by every op that has a matrix; stacks have their own.
@pytest.mark.parametrize(
    ("family", "rows"), [*((family, False) for family in OPTIONS), ("gpt_oss", True), ("lfm2", True)]
)
def test_comes_closer_to_the_source(tmp_path, family, rows):
    torch.manual_seed(0)
    _, program, weights = small_model(family)

    def a_table_a_matrix(name, shape):
        return replace(RULE, rows_per_table=shape[-2])

    dense = write_program(tmp_path / "dense.rkf", program, weights, context_length=32)
    model = write_program(tmp_path / "model.rkf", program, weights, a_table_a_matrix, context_length=32)
    text = tmp_path / "text.txt"
    words = np.random.Generator(np.random.Philox(key=1)).integers(3, 64, 400)
    text.write_text(" ".join(f"t{word}" for word in words), encoding="utf-8")
    report = tune(model, dense, tmp_path / "tuned.rkv", data=text, minutes=0.03, rows=rows)
    assert report["steps"] > 0 and report["kld"] < report["kld_before"]
    with rkf.open(model) as old, rkf.open(model, values=tmp_path / "tuned.rkv") as new:
        stacks = [name for name, entry in old.tensors.items() if entry.clusters and len(entry.shape) == 3]
        assert bool(stacks) == (family in ("gpt_oss", "qwen3_moe"))
        for name in stacks:
            before, after = old.values(name).centroids, new.values(name).centroids
            assert after.shape == (4, 4) and (np.diff(after) > 0).all() and not np.array_equal(before, after)
