"""Tuning a tiny model: it gets closer to its source, ranks and order stay, interruptions lose nothing."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import rkf
from rkf.cluster.clustering import cluster
from rkf.cluster.recipe import Rule
from rkf.errors import CorruptError, OutputError, UsageError
from rkf.file.fold import fold
from rkf.file.values import write_values
from rkf.format.matrix import DenseTensor, MatrixValues
from rkf.torch import ClusteredWeight
from rkf.tune import checkpoint, tune, tuning
from rkf.tune.live import LiveValues
from tests.runtime import tiny
from tests.runtime.files import write_model

CONFIG = tiny.config(context_length=48)
RULES = {
    "plain": Rule(k=8, exceptions=0.01),
    "rows": Rule(k=8, affine="row"),
    "groups on tables": Rule(k=8, affine="group", group=32, rows_per_table=32),
}


@pytest.fixture
def files(tmp_path):
    """A dense model, and a text to tune it on."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(tiny.CORPUS) * 8, encoding="utf-8")
    return write_model(tmp_path / "dense.rkf", CONFIG, tiny.weights(CONFIG)), text


def clustered(tmp_path, rule=RULES["plain"]):
    return write_model(tmp_path / "model.rkf", CONFIG, tiny.weights(CONFIG), rule)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_comes_closer_to_the_source_and_keeps_the_order(tmp_path, files, rule):
    dense, text = files
    model, out = clustered(tmp_path, rule), tmp_path / "tuned.rkv"
    report = tune(model, dense, out, data=text, minutes=0.05)
    assert report["steps"] > 0
    assert report["kld"] < report["kld_before"]
    assert not (tmp_path / "tuned.rkv.tuning").exists()
    with rkf.open(model) as old, rkf.open(model, values=out) as new:
        assert new.order == "ascending"
        for name, entry in old.tensors.items():
            if entry.kind == "clustered":
                before, after = old.values(name), new.values(name)
                assert (np.diff(after.centroids) > 0).all() and (after.affine.a > 0).all()
                assert not np.array_equal(before.centroids, after.centroids)
    ids = np.arange(40)
    with rkf.load(dense) as one, rkf.load(model) as two, rkf.load(model, values=out) as three:
        assert divergence(one, three, ids) < divergence(one, two, ids)


def divergence(reference, model, ids):
    p, q = (logits - logits.max(axis=1, keepdims=True) for logits in (reference.logits(ids), model.logits(ids)))
    p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(axis=1).mean()


def test_a_factor_a_row(tmp_path, files):
    dense, text = files
    model, out = clustered(tmp_path), tmp_path / "tuned.rkv"
    report = tune(model, dense, out, data=text, minutes=0.02, rows=True)
    with rkf.open(model, values=out) as container:
        assert container.values("model.embed_tokens.weight").affine.a.shape == (CONFIG.vocab_size,)
    assert report["parameters"] > CONFIG.vocab_size


def test_text_sampled_from_the_reference(tmp_path, files, monkeypatch):
    monkeypatch.setattr(tuning, "SEQUENCES", 6)
    dense, _ = files
    report = tune(clustered(tmp_path), dense, tmp_path / "tuned.rkv", minutes=0.02)
    assert report["kld"] < report["kld_before"]


def test_goes_on_after_an_interruption(tmp_path, files):
    dense, text = files
    model, out = clustered(tmp_path), tmp_path / "tuned.rkv"

    told = []

    def interrupt(what, done, total):
        told.append(what)
        if sum(what.startswith("tune") for what in told) == 11:  # after the first check, before the second
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, dense, out, data=text, minutes=5.0, progress=interrupt)
    assert not out.exists()
    seen = []
    with pytest.raises(UsageError, match="other inputs or options"):
        tune(model, dense, out, data=text, minutes=5.0, rows=True, resume=True)
    report = tune(model, dense, out, data=text, minutes=0.0001, resume=True, progress=lambda *told: seen.append(told))
    assert report["steps"] == 11  # only those before the interruption: their time counts
    assert report["kld"] < report["kld_before"]
    assert not [what for what, *_ in seen if what == "reference"]


def test_what_does_not_fit_is_refused(tmp_path, files):
    dense, text = files
    model, out = clustered(tmp_path), tmp_path / "tuned.rkv"
    other = tiny.config(context_length=48, norm_epsilon=1e-6)
    stranger = write_model(tmp_path / "other.rkf", other, tiny.weights(other))
    with pytest.raises(UsageError, match="another model"):
        tune(model, stranger, out, data=text)
    with pytest.raises(UsageError, match="nothing to tune"):
        tune(dense, dense, out, data=text)
    with pytest.raises(UsageError, match="has clustered tensors"):
        tune(model, model, out, data=text)
    for problem, content in (("expected UTF-8 text", b"\xff"), ("expected at least 96 for training", b"short")):
        text.write_bytes(content)
        with pytest.raises(UsageError, match=problem):
            tune(model, dense, out, data=text)
    with pytest.raises(UsageError, match="absent: cannot be read: No such file"):
        tune(model, dense, out, data=tmp_path / "absent")
    out.touch()
    with pytest.raises(UsageError, match="exists already"):
        tune(model, dense, out, data=text)


@pytest.mark.parametrize("values", [(-0.5, 0.1), (-0.5, 0.0)], ids=["numbers", "subnormals"])
def test_a_table_with_few_distinct_values_ascends_however_it_rises(values):
    weights = np.resize(np.array(values, np.float32), (4, 32))
    matrix, _ = cluster(DenseTensor("f32", weights), Rule(k=8), "w")
    live = LiveValues(ClusteredWeight(matrix), matrix.counts, rows=False)
    with torch.no_grad():
        for last in (1.0, 1.5):  # at 1.5 the second real value rises past those that fill the table
            live.weight.centroids[:, 1] = last
            live.restore_order()
            assert (np.diff(live.to_matrix(matrix.values).centroids) > 0).all()


def interrupted(model, dense, out, text):
    """Leave a checkpoint of one step."""

    def interrupt(what, done, total):
        if what.startswith("tune"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, dense, out, data=text, minutes=5.0, progress=interrupt)


def test_goes_on_from_the_same_values_alone(tmp_path, files):
    dense, text = files
    model, out = clustered(tmp_path), tmp_path / "tuned.rkv"
    interrupted(model, dense, out, text)
    with rkf.open(model) as container:
        doubled = {
            name: MatrixValues(old.centroids * np.float32(2), old.affine, old.exceptions, old.exceptions_dtype)
            for name, old in ((name, container.values(name)) for name in clustered_names(container))
        }
        write_values(tmp_path / "doubled.rkv", container, doubled)
    fold(model, tmp_path / "doubled.rkv", tmp_path / "other.rkf")  # the same ranks and dense tensors
    with pytest.raises(UsageError, match="other inputs or options"):
        tune(tmp_path / "other.rkf", dense, out, data=text, resume=True)


def clustered_names(container):
    return [name for name, entry in container.tensors.items() if entry.kind == "clustered"]


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("state", lambda tensors, told: tensors.popitem(), "hash"),
        ("state", lambda tensors, told: tensors.update({"0.value": torch.zeros(3)}), "hash"),
        ("state", lambda tensors, told: told.pop("step"), "hash"),
        ("lesson", lambda tensors, told: tensors["ids"].add_(1), "hash"),
        ("state", lambda tensors, told: told.update(spent="-inf"), "out of range"),
        ("state", lambda tensors, told: told.update(step="x"), "a number is missing"),
        ("state", lambda tensors, told: tensors["0.best"].fill_(torch.nan), "finite numbers"),
        ("lesson", lambda tensors, told: tensors["ids"].fill_(1 << 40), "token ids"),
        ("lesson", lambda tensors, told: tensors.update(hidden=tensors["hidden"][:, :, :3].contiguous()), "hidden"),
    ],
)
def test_a_checkpoint_is_what_was_written(tmp_path, files, name, change, problem):
    """Also if its hash is made to fit."""
    dense, text = files
    model, out = clustered(tmp_path), tmp_path / "tuned.rkv"
    interrupted(model, dense, out, text)
    path = tmp_path / f"tuned.rkv.tuning/{name}.safetensors"
    with safe_open(path, "pt") as file:
        told, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(tensors, told)
    if problem != "hash":
        told["blake3"] = checkpoint._digest(tensors, {key: each for key, each in told.items() if key != "blake3"})
    save_file(tensors, path, told)
    with pytest.raises(CorruptError, match=f"{name}.safetensors: damaged .*{problem}.*omit --resume"):
        tune(model, dense, out, data=text, resume=True)


@pytest.mark.parametrize("name", ["lesson.safetensors", "state.safetensors"])
def test_a_damaged_checkpoint_is_refused_and_started_again(tmp_path, files, name):
    dense, text = files
    model, out = clustered(tmp_path), tmp_path / "tuned.rkv"
    interrupted(model, dense, out, text)
    folder = tmp_path / "tuned.rkv.tuning"
    stored = folder / name
    stored.write_bytes(stored.read_bytes()[:-1])
    (folder / f".{name}.partial").write_bytes(b"of a killed writer")
    (folder / "notes").write_text("a user's")
    with pytest.raises(CorruptError, match=f"{name}: damaged .*omit --resume"):
        tune(model, dense, out, data=text, resume=True)
    tune(model, dense, out, data=text, minutes=0.001)
    assert [path.name for path in folder.iterdir()] == ["notes"]


def test_a_checkpoint_that_cannot_be_written(tmp_path, files):
    dense, text = files
    (tmp_path / "tuned.rkv.tuning").touch()  # a file where the folder would be
    with pytest.raises(OutputError, match=r"tuned\.rkv\.tuning: expected a folder of rkf's own"):
        tune(clustered(tmp_path), dense, tmp_path / "tuned.rkv", data=text)
