"""The oracle itself, against transformers, for every family."""

import numpy as np
import pytest
import torch
import transformers

from rkf.model.first_form import RopeScaling
from rkf.runtime.backend import Row
from tests.runtime import tiny
from tests.runtime.numpy_backend import NumpyBackend

LLAMA3 = RopeScaling("llama3", 4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64)
FAMILIES = {
    "llama": {},
    "llama, no grouping": {"kv_heads": 4},
    "llama3 scaling": {"rope_scaling": LLAMA3},
    "linear scaling": {"rope_scaling": RopeScaling("linear", 2.0)},
    "mistral": {"architecture": "mistral"},
    "qwen2": {"architecture": "qwen2"},
    "qwen3": {"architecture": "qwen3", "head_dim": 24},
}


def reference(config):
    """A random transformers model of this configuration."""
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    name = names[config.architecture]
    numbers = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": rope_parameters(config),
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "sliding_window": None,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**numbers)).eval()
    with torch.no_grad():  # biases and norms are born as zeros and ones, which would hide a mistake
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def rope_parameters(config):
    parameters = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        parameters |= {"rope_type": scaling.type, "factor": scaling.factor}
        if scaling.type == "llama3":
            parameters |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_context,
            }
    return parameters


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES.keys())
def test_equals_transformers(changes):
    config = tiny.config(**changes)
    theirs = reference(config)
    weights = {name: data.detach().numpy() for name, data in theirs.state_dict().items() if name != "lm_head.weight"}
    ids = np.random.Generator(np.random.Philox(key=3)).integers(0, config.vocab_size, 100)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)[None]).logits[0].numpy()
    backend = NumpyBackend(config, weights)
    sequence = backend.new_sequence(100)
    parts = [backend.forward([Row(sequence, part)], "all") for part in (ids[:60], ids[60:61], ids[61:])]
    np.testing.assert_allclose(np.concatenate(parts), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    sequence.truncate(59)
    again = backend.forward([Row(sequence, ids[59:61])])
    np.testing.assert_allclose(again, expected[60:61], rtol=1e-3, atol=1e-4 * np.abs(expected).max())
