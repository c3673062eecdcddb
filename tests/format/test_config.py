"""ModelConfig: the round trip through metadata, and the refusal of every bad key."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rkf.errors import StructureError, UnsupportedError
from rkf.model.first_form import ARCHITECTURES, ModelConfig, RopeScaling
from tests.format.build import CONFIG
from tests.format.first_form_metadata import metadata_of

LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 2.0), LLAMA3])
def test_it_comes_back(architecture: str, scaling: RopeScaling | None) -> None:
    config = replace(CONFIG, architecture=architecture, rope_scaling=scaling, sliding_window=32, eos_ids=(2, 3))
    assert ModelConfig.from_metadata(metadata_of(config)) == config


def test_least_metadata_comes_back() -> None:
    config = replace(CONFIG, bos_id=None, eos_ids=(), add_bos=False, generation={})
    assert ModelConfig.from_metadata(metadata_of(config)) == config
    assert ModelConfig.from_metadata({**metadata_of(config), "x-more": [1]}) == config
    assert ModelConfig.from_metadata({**metadata_of(config), "generation": {"x-more": [1]}}) == config


def test_integers_stand_for_floats() -> None:
    config = ModelConfig.from_metadata({**metadata_of(CONFIG), "rope_theta": 10000})
    assert isinstance(config.rope_theta, float)


@pytest.mark.parametrize("key", [k for k in metadata_of(CONFIG) if k != "bos_id"])
def test_missing_keys_are_named(key: str) -> None:
    metadata = metadata_of(CONFIG)
    del metadata[key]
    with pytest.raises(StructureError, match=f"metadata.model: expected the key '{key}'"):
        ModelConfig.from_metadata(metadata)


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim", "context_length")


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4", 1 << 31])
def test_sizes_are_positive_integers(key: str, value: Any) -> None:
    with pytest.raises(StructureError, match=f"metadata.model, {key}"):
        ModelConfig.from_metadata({**metadata_of(CONFIG), key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture", 3),
        ("heads", 3),
        ("kv_heads", 3),
        ("head_dim", 5),
        ("norm_epsilon", 0.0),
        ("norm_epsilon", "small"),
        ("rope_theta", -1.0),
        ("rope_theta", True),
        ("sliding_window", 0),
        ("bos_id", 40),
        ("bos_id", -1),
        ("eos_ids", [40]),
        ("eos_ids", [-1]),
        ("eos_ids", 2),
        ("eos_ids", ["2"]),
        ("eos_ids", [2] * 257),
        ("add_bos", 1),
        ("generation", {"temperature": "hot"}),
        ("generation", []),
        ("extra", 1),
        ("rope_scaling", 8),
        ("rope_scaling", {}),
        ("rope_scaling", {"type": 1}),
        ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", {"type": "linear", "factor": 0}),
        ("rope_scaling", {"type": "linear", "factor": 2, "low_freq_factor": 1}),
        ("rope_scaling", {"type": "llama3", "factor": 2.0}),
        ("rope_scaling", {**metadata_of(CONFIG), "type": "llama3"}),
    ],
)
def test_wrong_values_are_refused(key: str, value: Any) -> None:
    with pytest.raises(StructureError, match=r"metadata\.model"):
        ModelConfig.from_metadata({**metadata_of(CONFIG), key: value})


def test_add_bos_needs_a_bos() -> None:
    metadata = metadata_of(CONFIG)
    del metadata["bos_id"]
    with pytest.raises(StructureError, match="bos_id"):
        ModelConfig.from_metadata(metadata)


def test_llama3_factors_are_in_order() -> None:
    metadata = metadata_of(replace(CONFIG, rope_scaling=replace(LLAMA3, low_freq_factor=4.0)))
    with pytest.raises(StructureError, match="low_freq_factor"):
        ModelConfig.from_metadata(metadata)


@pytest.mark.parametrize(
    ("key", "value"), [("architecture", "gpt2"), ("rope_scaling", {"type": "yarn", "factor": 4.0})]
)
def test_what_is_unknown_is_unsupported(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=rf"metadata\.model, {key}.*update rkf"):
        ModelConfig.from_metadata({**metadata_of(CONFIG), key: value})


@pytest.mark.parametrize("value", [None, [], "llama", 3])
def test_a_model_is_a_map(value: Any) -> None:
    with pytest.raises(StructureError, match="a map"):
        ModelConfig.from_metadata(value)
