"""Second moments for the rows of embeddings: what a change of a row does behind the first layer."""

import numpy as np
import pytest

from rkf.calibrate import tables
from rkf.calibrate.interpreter import Flow, Stretch
from rkf.calibrate.passes import TensorReader
from rkf.cluster.clustering import cluster
from rkf.cluster.compensate import objectives
from rkf.cluster.recipe import Rule
from rkf.format.matrix import DenseTensor
from tests.calibrate.small_models import BASE, small_model

TABLE = "model.embed_tokens.weight"
COLUMNS = BASE["hidden_size"]
TOKENS = np.random.Generator(np.random.Philox(1)).integers(0, BASE["vocab_size"], (40, 12)).astype(np.uint32)


def behind(program, weights, table, ids):
    """The stream behind the first layer, f32[sequences, tokens, width]."""
    tensors = {**weights, TABLE: table}
    flow = Stretch.stem(program, ids.shape[1])(tensors, Flow(ids))
    return Stretch.of_layer(program, 0, ids.shape[1])(tensors, flow).values["x"]


def test_they_are_those_of_the_changes_of_each_column(monkeypatch):
    monkeypatch.setattr(tables, "_TOGETHER", 20)  # so that the last pass has fewer
    _, program, weights = small_model("llama")
    ids = TOKENS[:6, :1]  # one token each: a row changes its own value alone
    found = tables.moments_of_tables(program, TensorReader(weights.__getitem__), ids)[TABLE]
    true = behind(program, weights, weights[TABLE], ids)
    expected = np.zeros((COLUMNS, COLUMNS))
    for number, row in enumerate(ids[:, 0]):
        size = tables._CHANGE * np.linalg.norm(weights[TABLE][row])
        sign = np.random.Generator(np.random.Philox(key=number)).choice([-1, 1], 1)[0]
        effects = []
        for column in range(COLUMNS):
            table = weights[TABLE].copy()
            table[row, column] += sign * size
            change = behind(program, weights, table, ids[[number]])[0, 0] - true[number, 0]
            effects.append(change / np.sqrt(np.mean(true[number, 0] ** 2)))
        expected += np.array(effects) @ np.array(effects).T
    expected += tables._DAMPING * np.diagonal(expected).mean() * np.eye(COLUMNS)
    assert np.abs(found - expected).max() < 0.02 * expected.max()


@pytest.mark.parametrize(
    ("family", "share"), {"llama": 0.85, "gemma3_text": 0.9, "gpt_oss": 0.97, "qwen3_moe": 0.9, "lfm2": 0.8}.items()
)
def test_rows_clustered_for_them_change_less(family, share):
    _, program, weights = small_model(family)
    moments = tables.moments_of_tables(program, TensorReader(weights.__getitem__), TOKENS[::2])[TABLE]
    true, changes = behind(program, weights, weights[TABLE], TOKENS[1::2]), []
    for objective in (None, objectives(moments)):
        tensor = DenseTensor("f32", weights[TABLE])
        table = cluster(tensor, Rule(k=16), TABLE, objective)[0].decode()
        changed = behind(program, weights, table, TOKENS[1::2])
        changes.append(np.sum(np.square(changed - true) / np.square(true).mean(axis=-1, keepdims=True)))
    assert changes[1] < share * changes[0]


def test_a_table_that_is_the_output_head_has_a_part_of_both():
    random = np.random.Generator(np.random.Philox(2)).standard_normal((2, 9, 4)).astype(np.float32)
    head, table = (x.T @ x for x in random)
    found = tables.of_both(head * 50, table)
    np.testing.assert_allclose(found, 4 * (0.7 * head / np.trace(head) + 0.3 * table / np.trace(table)), rtol=1e-5)


def test_rows_of_zeros_give_finite_moments():
    _, program, weights = small_model("llama")
    for table in (np.where(np.arange(BASE["vocab_size"])[:, None] % 2, weights[TABLE], 0), weights[TABLE] * 0):
        tensors = {**weights, TABLE: table}
        found = tables.moments_of_tables(program, TensorReader(tensors.__getitem__), TOKENS)[TABLE]
        assert np.isfinite(found).all() and np.isfinite(tables.of_both(found * 0, found)).all()


def test_they_do_not_depend_on_threads(monkeypatch):
    _, program, weights = small_model("llama")
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(tables, "workers", lambda threads=threads: threads)
        found.append(tables.moments_of_tables(program, TensorReader(weights.__getitem__), TOKENS)[TABLE])
    np.testing.assert_array_equal(*found)
