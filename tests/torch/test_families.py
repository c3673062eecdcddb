"""Every family through the torch backend: a converted checkpoint in odd chunks gives the logits of transformers."""

import numpy as np
import pytest

import rkf
from rkf.converters.pipeline import convert
from rkf.runtime.backend import Row
from rkf.runtime.torch_backend import TorchBackend
from tests.families.models import TOKENS, VARIANTS, logits_of, model_of, save, tokens


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_transformers(tmp_path, variant):
    model = model_of(variant)
    wanted = logits_of(model)
    convert(save(model, tmp_path / "model"), tmp_path / "m.rkf", recipe="dense")
    with rkf.open(tmp_path / "m.rkf") as container:
        backend = TorchBackend(container)
    ids = np.array(tokens())
    for cuts in ([], [1, 2, 9, 40, 41], list(range(1, TOKENS))):
        sequence = backend.new_sequence(TOKENS)
        found = np.concatenate([backend.forward([Row(sequence, part)], "all") for part in np.split(ids, cuts)])
        assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
