"""`load_into`: transformers models that carry an rkf file compute the same as with its decoded weights."""

import numpy as np
import pytest
import torch

import rkf
from rkf.cluster.recipe import Rule
from rkf.errors import UsageError
from rkf.file.values import write_values
from rkf.format.matrix import MatrixValues
from rkf.torch import ClusteredEmbedding, ClusteredLinear, load_into
from tests.runtime import tiny
from tests.runtime.files import write_model
from tests.runtime.test_numpy_backend import reference

RULE = Rule(k=16, grid=True, affine="row", exceptions=0.01)
IDS = torch.arange(5, 60)[None]


def weights_of(model):
    return {
        name: value.detach().numpy().copy() for name, value in model.state_dict().items() if name != "lm_head.weight"
    }


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("rule", [RULE, None], ids=["clustered", "dense"])
def test_a_transformers_model_carries_a_file(tmp_path, architecture, rule):
    config = tiny.config(architecture=architecture)
    path = write_model(tmp_path / "m.rkf", config, weights_of(reference(config)), rule)
    expected = reference(config)
    with rkf.open(path) as container, torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_(torch.from_numpy(container.decode(name).copy()))
    carrier = reference(config)
    with torch.no_grad():
        for parameter in carrier.parameters():
            parameter.zero_()
        assert load_into(carrier, path) is carrier
        torch.testing.assert_close(carrier(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-3)
    assert isinstance(carrier.model.embed_tokens, ClusteredEmbedding if rule else torch.nn.Embedding)
    assert isinstance(carrier.model.layers[0].self_attn.q_proj, ClusteredLinear if rule else torch.nn.Linear)
    assert carrier.lm_head.weight is carrier.model.embed_tokens.weight


def test_other_values_take_their_place(tmp_path):
    config = tiny.config()
    path = write_model(tmp_path / "m.rkf", config, weights_of(reference(config)), RULE)
    name = "model.layers.0.mlp.up_proj.weight"
    with rkf.open(path) as container:
        old = container.values(name)
        changed = MatrixValues(old.centroids * np.float32(2), old.affine, old.exceptions, old.exceptions_dtype)
        write_values(tmp_path / "v.rkv", container, {name: changed})
    plain, doubled = load_into(reference(config), path), load_into(reference(config), path, values=tmp_path / "v.rkv")
    before, after = (m.model.layers[0].mlp.up_proj.weight.centroids for m in (plain, doubled))
    assert torch.equal(after, 2 * before)


def test_what_does_not_fit_is_refused(tmp_path):
    config = tiny.config()
    weights = weights_of(reference(config))
    path = write_model(tmp_path / "m.rkf", config, weights, RULE)
    with pytest.raises(UsageError, match=r"layers\.1\..* no parameter of this name"):
        load_into(reference(tiny.config(layers=1)), path)
    with pytest.raises(UsageError, match=r"parameter 'model\.layers\.2\..*' is not in the file"):
        load_into(reference(tiny.config(layers=3)), path)
    with pytest.raises(UsageError, match=r"expects shape \(64, 112\), got \(64, 96\)"):
        load_into(reference(tiny.config(intermediate_size=112)), path)
