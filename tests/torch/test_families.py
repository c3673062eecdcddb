"""Every family through the torch backend: a converted checkpoint in odd chunks gives the logits of transformers; and
conversations of models with experts and with recurrent states.
"""

import numpy as np
import pytest

import rkf
from rkf.converters.pipeline import convert
from rkf.runtime.backend import Row
from rkf.runtime.torch_backend import TorchBackend
from tests.calibrate.small_models import small_model
from tests.families.common_keys import TOKENS
from tests.families.models import VARIANTS, logits_of, model_of, save, tokens
from tests.families.on_cpu import settled
from tests.torch.program_files import write_program

# Random models of these families amplify rounding: transformers' own f32 logits are 8e-6 to 4.4e-5 from its f64.
_ILL_CONDITIONED = ("qwen3_5", "qwen3_5_moe", "gemma4", "gemma4_unified")


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
        bound = 1e-4 if variant.partition("-")[0] in _ILL_CONDITIONED else 1e-5
        compared = slice(settled(backend.metadata.program, TOKENS) if cuts else 0, None)
        assert np.abs(found - wanted)[compared].max() < bound * np.abs(wanted).max()


@pytest.mark.parametrize("family", ["gpt_oss", "lfm2", "qwen3_5_text"])
def test_a_conversation_goes_on(tmp_path, family):
    """What is held of earlier text makes no difference: a recurrent state begins anew where it cannot go back."""
    _, program, weights = small_model(family)
    path = write_program(tmp_path / "m.rkf", program, weights)
    prompts = ["t3 t9 t12", "t3 t9 t12 t40", "t3 t9 t50", "t7"]
    with rkf.load(path, device="cpu-torch") as model:
        together = [model.generate(prompt, raw=True, max_tokens=12) for prompt in prompts]
    for prompt, text in zip(prompts, together, strict=True):
        with rkf.load(path, device="cpu-torch") as model:
            assert model.generate(prompt, raw=True, max_tokens=12) == text
    assert len(set(together)) > 1
