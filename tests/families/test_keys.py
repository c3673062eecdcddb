"""Each key of each config.json, left out: what the reference takes then, or a refusal by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from rkf.converters.description import describe
from rkf.errors import RkfError, SourceError, UnsupportedError

from .common_keys import YARN
from .models import VARIANTS, model_of

# Kept, else no family is chosen.
_NAME = "model_type"
# Versions of the reference before 5 took null here, and published files have it: as many as there are heads.
_OF_OLD = ("num_key_value_heads",)


def config_of(variant: str, folder: Path) -> dict[str, Any]:
    model_of(variant).config.save_pretrained(folder)
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def spelt_out(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with every default that the reference has."""
    kind = config[_NAME]
    rest = {key: value for key, value in json.loads(json.dumps(config)).items() if key != _NAME}
    rest = transformers.PreTrainedConfig._decode_special_floats(rest)  # as it reads infinity from a file
    full = transformers.AutoConfig.for_model(kind, **rest).to_dict()
    found: dict[str, Any] = json.loads(json.dumps(full))
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_key_left_out(tmp_path: Path, variant: str) -> None:
    config = config_of(variant, tmp_path)
    for key in config:
        if key == _NAME:
            continue
        reduced = {name: value for name, value in config.items() if name != key}
        try:
            expected = describe(spelt_out(reduced), "x")
        except Exception:  # noqa: BLE001 - the reference raises what it likes
            with pytest.raises(RkfError):
                describe(reduced, "x")
            continue
        found = describe(reduced, "x")
        assert found.program == expected.program, key
        assert found.keys.eos_token_id == expected.keys.eos_token_id, key
        assert found.keys.bos_token_id == expected.keys.bos_token_id, key
        assert found.keys.max_position_embeddings == expected.keys.max_position_embeddings, key
        assert found.keys.tie_word_embeddings == expected.keys.tie_word_embeddings, key


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_key_of_another_type(tmp_path: Path, variant: str) -> None:
    config = config_of(variant, tmp_path)
    described = describe(config, "x")
    for key in config:
        if key in (_NAME, "rope_parameters"):
            continue
        for wrong in ("false", [None], {"a": 1}, -1, 1.5, True, None):
            changed = {**config, key: wrong}
            try:
                found = describe(changed, "x")
            except RkfError as error:
                assert "x: " in str(error) and "\n" not in str(error)
                continue
            if found.program != described.program and not (
                wrong is None and key in _OF_OLD
            ):  # taken: then the reference takes it too, with the same meaning
                assert found.program == describe(spelt_out(changed), "x").program, (key, wrong)


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "high_freq_factor"])
@pytest.mark.parametrize("value", [None, "8", -1.0, True, [8]])
def test_numbers_of_a_rope(tmp_path: Path, key: str, value: Any) -> None:
    config = config_of("llama", tmp_path)
    rope = {**config["rope_parameters"], key: value}
    with pytest.raises(SourceError, match=f"rope scaling: {key}: expected a positive number"):
        describe({**config, "rope_parameters": rope}, "x")


def test_a_yarn_whose_factor_is_null_stretches_to_the_context(tmp_path: Path) -> None:
    config = config_of("llama", tmp_path)
    factor = config["max_position_embeddings"] / YARN["original_max_position_embeddings"]
    programs = [
        describe({**config, "rope_parameters": YARN | {"factor": each}}, "x").program for each in (None, factor)
    ]
    assert programs[0] == programs[1]


def test_lists_of_a_longrope(tmp_path: Path) -> None:
    config = config_of("phi3", tmp_path)
    rope = {**config["rope_parameters"], "long_factor": [1.0] * 5}
    with pytest.raises(SourceError, match="long_factor: expected 6 numbers"):
        describe({**config, "rope_parameters": rope}, "x")


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("phi3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
        ("qwen3", {"layer_types": ["linear_attention"] * 3}, "layer_types: 'linear_attention'"),
        ("llama", {"hidden_act": "mish"}, "activation 'mish'"),
        ("llama", {"model_type": "mamba"}, "architecture 'mamba'"),
        ("llama", {"model_type": None}, "architecture None"),
        (
            "llama",
            {"model_type": "mistral3", "text_config": {"model_type": "qwen2"}},
            "text_config: architecture 'qwen2'",
        ),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("llama", {"is_causal": False}, "is_causal"),  # of embedding models made from decoders
        ("gpt_oss", {"is_causal": False}, "is_causal"),
        ("llama", {"model_type": "mistral3", "text_config": {}, "is_causal": False}, "is_causal: False"),
        ("gpt_neox", {"head_dim": 32}, "head_dim: 32 is not supported; expected 16"),  # turns 32, and has heads of 16
        ("stablelm", {"head_dim": 32}, "head_dim: 32 is not supported; expected 16"),
        ("llama", {"per_layer_config": {"1": {"mlp_bias": True}}}, "per_layer_config: layers with keys of their own"),
    ],
)
def test_what_rkf_cannot_express(tmp_path: Path, variant: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=f"x: .*{message}"):
        describe({**config_of(variant, tmp_path), **changes}, "x")


_YARN = {key: value for key, value in YARN.items() if key != "factor"}
_BY_KIND = {"full_attention": {"rope_type": "linear", "factor": 2.0}}


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("qwen3", {"rope_parameters": _BY_KIND}, "rope_parameters: expected the same for all layers, got an object at"),
        ("llama4", {"layer_types": []}, "layer_types: expected a list of a word for each layer"),
        ("qwen3_5", {"layer_types": []}, "layer_types: expected a list of a word for each layer"),
        ("qwen3", {"use_sliding_window": False}, "layer_types: sliding_attention expects a number as sliding_window"),
        ("qwen3", {"sliding_window": None}, "layer_types: sliding_attention expects a number as sliding_window"),
        ("ministral", {"sliding_window": None}, "sliding_window: expected a number, as layer_types has"),
        ("llama", {"rope_parameters": _YARN}, "rope scaling: factor: expected a positive number, got None"),
    ],
)
def test_what_the_reference_refuses(tmp_path: Path, variant: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=f"x: {message}"):
        describe({**config_of(variant, tmp_path), **changes}, "x")


def test_layer_types_of_a_mistral_are_read_as_in_the_reference(tmp_path: Path) -> None:
    config = config_of("ministral", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == config[_NAME] == "ministral"
    assert describe({**config, "model_type": "mistral"}, "x").program == describe(config, "x").program
    plain = {key: value for key, value in config.items() if key != "layer_types"} | {"model_type": "mistral"}
    inside = [{"model_type": "mistral3", "text_config": plain | more} for more in ({}, {"layer_types": ["x"]})]
    assert describe(inside[0], "x").program == describe(inside[1], "x").program == describe(plain, "x").program
    assert describe(plain, "x").program != describe(config, "x").program


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("ernie4_5_moe", {"num_experts_per_tok": 1}),
        ("ernie4_5_moe", {"num_experts": 4}),
        ("glm4_moe", {"num_local_experts": 4}),
        ("glm4_moe_lite", {"head_dim": 4}),
        ("olmoe", {"num_local_experts": 4}),
        ("mixtral", {"num_experts": 2}),
        ("qwen3_moe", {"num_experts": 8, "num_local_experts": 4}),
        ("granitemoehybrid", {"layers_block_type": ["attention", "mamba", "mamba"]}),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_key_under_two_names(tmp_path: Path, variant: str, changes: dict[str, Any], first: bool) -> None:
    """The name that the reference maps to the other one overrides it, wherever it stands."""
    config = config_of(variant, tmp_path)
    both = {**changes, **config} if first else {**config, **changes}
    found = describe({**both, **changes}, "x")
    assert found.program == describe(spelt_out({**both, **changes}), "x").program
    assert found.program != describe(config, "x").program


def test_windows_without_a_number(tmp_path: Path) -> None:
    config = config_of("qwen2_moe-mixed", tmp_path)
    with pytest.raises(SourceError, match="x: sliding_window: expected a number above 0 with use_sliding_window"):
        describe({**config, "sliding_window": None, "layer_types": None}, "x")
    assert describe({**config, "sliding_window": None, "use_sliding_window": False}, "x").program


@pytest.mark.parametrize("variant", ["qwen2", "qwen3_moe"])
def test_a_window_of_zero_may_stand_unused(tmp_path: Path, variant: str) -> None:
    config = {**config_of(variant, tmp_path), "layer_types": None, "sliding_window": 0}
    unused = {**config, "use_sliding_window": False}
    assert describe(unused, "x").program == describe({**unused, "sliding_window": 9}, "x").program
    with pytest.raises(
        SourceError, match="x: sliding_window: expected a number above 0 with use_sliding_window, got 0"
    ):
        describe({**config, "use_sliding_window": True}, "x")


def test_both_spellings_of_gemma3(tmp_path: Path) -> None:
    config = config_of("gemma3", tmp_path)
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "layer_types")}
    old |= {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 3,
    }
    assert describe(old, "x").program == describe(config, "x").program


@pytest.mark.parametrize("variant", ["gemma3", "olmo3"])
def test_an_old_word_for_the_kind_of_rope_that_the_reference_does_not_read(tmp_path: Path, variant: str) -> None:
    config = {key: value for key, value in config_of(variant, tmp_path).items() if key != "rope_parameters"}
    stretch = {"type": "linear", "factor": 8.0}
    with pytest.raises(UnsupportedError, match="x: rope_scaling: type 'linear' without rope_type is not supported"):
        describe({**config, "rope_scaling": stretch}, "x")
    found = describe({**config, "rope_scaling": {**stretch, "rope_type": "linear"}}, "x")
    assert found.program != describe(config, "x").program
    assert describe({**config, "rope_scaling": {"type": "default"}}, "x").program == describe(config, "x").program
