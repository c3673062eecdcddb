"""Each family to GGUF and back: the same tensors and program; what a GGUF has no words for is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from rkf.converters.description import describe
from rkf.converters.export import export_gguf, export_hf
from rkf.converters.families import FAMILIES
from rkf.converters.families.family import GgufFields, GgufModel
from rkf.converters.families.gguf_config import RMS_EPSILON, config_of, fields_of
from rkf.converters.families.gguf_rope import FACTORS
from rkf.converters.families.gguf_yarn import MAGNITUDE
from rkf.converters.families.layout import Layout
from rkf.converters.families.windows import WINDOW
from rkf.converters.gguf_header import read_header
from rkf.converters.pipeline import convert
from rkf.converters.source import open_source
from rkf.errors import RkfError, UnsupportedError
from rkf.model.ops import Attention

from .common_keys import COMMON, LLAMA3, YARN
from .models import VARIANTS, loaded, logits_of, model_of, save, tokens

# Why a variant has no GGUF.
REFUSED = {
    "llama-gelu": "hidden_act: 'gelu' is not supported; expected silu",
    "ministral": "layer_types: a GGUF of this family cannot store a window",
    "qwen2": "layer_types: a GGUF of this family cannot store a window",
    "qwen3": "layer_types: a GGUF of this family cannot store a window",
    "qwen3-biases": "truncate: False is not supported",
    "olmo2-biases": "hidden_act: 'relu'",
    "phi3-window": "head_dim: a GGUF cannot store heads",
    "gemma3-softcap": "query_pre_attn_scalar: 24 is not supported; expected 16",
    "qwen3_moe-mixed": "norm_topk_prob: False",
    "ministral3-window": "sliding_window: 20 is not supported; expected null",
    "gemma2-no-softcaps": "query_pre_attn_scalar: 24 is not supported; expected 16",
    "smollm3-window": "attention_bias: True",
    "olmo3-biases": "tie_word_embeddings: True",
    "exaone4": "sliding_window: llama.cpp has windows only in a model of 64 layers",
    "cohere2-biases": "attention_bias: True",
    "seed_oss-biases": "attention_out_bias: True",
    "ernie4_5-biases": "use_bias: True",
    "mixtral-window": "sliding_window: 20",
    "qwen2_moe-mixed": "norm_topk_prob: True",
    "olmoe-clip": "norm_topk_prob: True",
    "gpt_oss-clamped": "attention_bias: False",
    "granitemoe-biases": "attention_bias: True",
    "ernie4_5_moe-mixed": "moe_layer_end_index: 2",
    "qwen3_5_moe-tied": "linear_value_head_dim: 16",
    "qwen3_5-mixed": "attention_bias: True",
    "gemma4-biases": "attention_bias: True",
    "mamba2-limits": "biases of the mixer's products",
    "granitemoehybrid-limits": "layer_types: llama.cpp needs layers of both",
    "lfm2-biases": "conv_bias: True",
    "lfm2_moe-plain": "norm_topk_prob: False",
    "gpt_neox-in-turn": "hidden_act: 'relu'",
    "starcoder2-window": "hidden_act: 'gelu'",
    "stablelm-parallel": "tie_word_embeddings: True",
    "apertus-relu": "hidden_act: 'relu2'",
    "arcee-biases": "attention_bias: True",
    "glm4_moe_lite-mixed": "mlp_layer_types: a GGUF",
    "deepseek_v3-plain": "attention_bias: True",
    "llama4-chunks": "attention_bias: True",
    "nemotron-biases": "head_dim: a GGUF cannot store heads",
}
WRITTEN = [variant for variant in VARIANTS if variant not in REFUSED]


def written(folder: Path, variant: str) -> Path:
    """A GGUF of a model whose values are exact in f16."""
    convert(save(model_of(variant), folder / "model", "float16"), folder / "m.rkf", recipe="dense")
    export_gguf(folder / "m.rkf", folder / "m.gguf")
    return folder / "m.gguf"


@pytest.mark.parametrize("variant", WRITTEN)
def test_the_same_tensors_come_back(tmp_path: Path, variant: str) -> None:
    after = open_source(written(tmp_path, variant))
    before = open_source(tmp_path / "model")
    assert after.aliases == before.aliases
    assert list(after.tensors) == list(before.tensors)
    for name in before.tensors:
        # A GGUF stores the exponential of A_log, rounded to f32.
        tolerance = 1e-6 if name.endswith("A_log") else 0
        np.testing.assert_allclose(after.read(name).decode(), before.read(name).decode(), tolerance, err_msg=name)
    mine, theirs = after.model.program, before.model.program
    assert (mine.kinds, mine.order, mine.top, mine.stem) == (theirs.kinds, theirs.order, theirs.top, theirs.stem)
    for one, other in zip(mine.ropes, theirs.ropes, strict=True):
        np.testing.assert_allclose(one.frequencies, other.frequencies, rtol=1e-5)
        np.testing.assert_allclose(one.long or (), other.long or (), rtol=1e-5)
        assert (one.original_context, one.factor) == (other.original_context, pytest.approx(other.factor, rel=1e-6))


@pytest.mark.parametrize("variant", ["llama", "phi3", "gemma3", "gemma4", "qwen3_moe", "olmo2", "mistral"])
def test_a_gguf_gives_a_folder_that_transformers_loads(tmp_path: Path, variant: str) -> None:
    convert(written(tmp_path, variant), tmp_path / "again.rkf", recipe="dense")
    export_hf(tmp_path / "again.rkf", tmp_path / "back")
    expected, found = logits_of(loaded(tmp_path / "model")), logits_of(loaded(tmp_path / "back"))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("variant", REFUSED)
def test_what_a_gguf_has_no_words_for(tmp_path: Path, variant: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"m\.rkf: {REFUSED[variant]}"):
        written(tmp_path, variant)
    assert not (tmp_path / "m.gguf").exists()


def test_experts_are_stacks_and_routers_are_exact(tmp_path: Path) -> None:
    tensors = read_header(written(tmp_path, "qwen3_moe")).tensors
    assert tensors["blk.0.ffn_gate_exps.weight"].shape == (8, 32, 64)
    assert tensors["blk.0.ffn_down_exps.weight"].shape == (8, 64, 32)
    assert tensors["blk.0.ffn_gate_inp.weight"].type.name == "F32"


def test_gemma_norms_have_one_added(tmp_path: Path) -> None:
    header = read_header(written(tmp_path, "gemma3"))
    path, source = tmp_path / "m.gguf", open_source(tmp_path / "model")
    for theirs, ours in (("output_norm", "model.norm"), ("blk.0.attn_q_norm", "model.layers.0.self_attn.q_norm")):
        stored = header.tensors[f"{theirs}.weight"].stored(path).view(np.float32)[0]
        np.testing.assert_array_equal(stored, source.read(f"{ours}.weight").decode() + 1)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # llama-cpp-python's own
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("variant", WRITTEN)
def test_llama_cpp_chooses_the_same(tmp_path: Path, variant: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(written(tmp_path, variant)), n_ctx=128, logits_all=True, verbose=False)
    model.eval(tokens()[:16])
    found = np.array(model.scores[:16])
    expected = logits_of(loaded(tmp_path / "model"))[:16]
    lost = expected.max(1) - expected[np.arange(16), found.argmax(1)]
    # ggml rounds activations to f16 beside weights in f16: near ties fall either way (gemma4: one of 0.02 %).
    assert lost.max() <= 0.005 * np.abs(expected).max()


def test_every_field_is_read_back(tmp_path: Path) -> None:
    """A config.json made of a GGUF describes the same model to whoever reads it next."""
    source = open_source(written(tmp_path, "gemma3"))
    config: dict[str, Any] = json.loads(source.verbatim["config.json"])
    assert (config["model_type"], config["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert config["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]


def test_an_architecture_whose_queries_have_no_temperature(tmp_path: Path) -> None:
    """Mistral Small 3 has the architecture of Ministral 3."""
    path = written(tmp_path, "ministral3")
    path.write_bytes(path.read_bytes().replace(b"attention.temperature_scale", b"attention.temperature_xxxxx"))
    mine, theirs = open_source(path).model.program, open_source(tmp_path / "model").model.program
    plain = {"temperature_beta": None, "temperature_length": None}
    expected = [[replace(op, **plain) if isinstance(op, Attention) else op for op in kind] for kind in theirs.kinds]
    assert [list(kind) for kind in mine.kinds] == expected


def test_windows_that_llama_cpp_assumes() -> None:
    own = {"block_count": 64, "attention.head_count": 2, "embedding_length": 32, "context_length": 9, RMS_EPSILON: 1e-5}
    config = config_of(FAMILIES["exaone4"], GgufModel(own | {"feed_forward_length": 8}, (), {}))
    assert (config["sliding_window"], config["layer_types"][2:4]) == (4096, ["sliding_attention", "full_attention"])


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "qwen3_5_moe_text"])
def test_the_width_of_experts_that_llama_cpp_assumes(family: str) -> None:
    own = {"block_count": 4, "attention.head_count": 2, "embedding_length": 32, "context_length": 9, RMS_EPSILON: 1e-5}
    own |= {"feed_forward_length": 64, "expert_count": 8, "expert_used_count": 2}
    config = config_of(FAMILIES[family], GgufModel(own, (), {}))
    assert (config["moe_intermediate_size"], config.get("shared_expert_intermediate_size", 64)) == (32, 64)
    with pytest.raises(UnsupportedError, match="expert_used_count: layers with different experts"):
        config_of(FAMILIES[family], GgufModel(own | {"expert_used_count": np.array([2, 1, 2, 2])}, (), {}))


def test_a_scale_beside_the_factors_of_gemma4() -> None:
    own = {"block_count": 2, "attention.head_count": 2, "embedding_length": 16, "context_length": 9, RMS_EPSILON: 1e-5}
    own |= {"feed_forward_length": 8, "attention.head_count_kv": 1, "attention.sliding_window": 4}
    own |= {"attention.key_length_swa": 8, "attention.value_length_swa": 8}
    own |= {"attention.sliding_window_pattern": np.array([True, False])}
    factors = {FACTORS: np.ones(4, np.float32)}
    rope = config_of(FAMILIES["gemma4_text"], GgufModel(own, (), factors))["rope_parameters"]["full_attention"]
    assert rope == {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    with pytest.raises(UnsupportedError, match=f"rope scaling 'linear' is not supported beside tensor {FACTORS}"):
        config_of(FAMILIES["gemma4_text"], GgufModel(own | {"rope.scaling.factor": 4.0}, (), factors))


def test_a_field_that_is_missing(tmp_path: Path) -> None:
    path = written(tmp_path, "olmo2")
    data = path.read_bytes()
    assert data.count(b"olmo2.block_count") == 1
    path.write_bytes(data.replace(b"olmo2.block_count", b"olmo2.block_xxxxx"))
    with pytest.raises(RkfError, match=r"m\.gguf: field block_count is missing"):
        open_source(path)


def test_latent_attention_of_an_older_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has keys and values of all heads in one matrix, and no widths of the latent."""
    family = FAMILIES["deepseek_v3"]

    def whole(config: Any) -> Layout:
        rest = family.gguf.layout(config)
        return lambda name: rest(name)[-1:]

    def older(config: Any) -> GgufFields:
        own = {key: each for key, each in family.gguf.to_fields(config).own.items() if not key.endswith("_mla")}
        widths = {"attention.key_length": 24, "attention.value_length": 12, "attention.head_count_kv": 4}
        return GgufFields(own | widths)

    form = replace(family.gguf, layout=whole, to_fields=older)
    monkeypatch.setitem(cast(dict[str, Any], FAMILIES), "deepseek_v3", replace(family, gguf=form))
    path = written(tmp_path, "deepseek_v3")
    monkeypatch.undo()
    assert "blk.0.attn_kv_b.weight" in read_header(path).tensors
    before, after = open_source(tmp_path / "model"), open_source(path)
    assert after.model.program.kinds == before.model.program.kinds
    for name in before.tensors:
        np.testing.assert_array_equal(after.read(name).decode(), before.read(name).decode(), name)


_SECTIONS = "rope.dimension_sections"
_PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
_OLD = {"rope.scaling.factor": None, "rope.scale_linear": 2.0}
# Fields of a file -> why it is refused, where llama.cpp computes something else than the keys can say, or nothing.
_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("gemma2", {"rope.scaling.type": "none"} | _OLD, "rope.scale_linear: 2.0 is not supported"),
    ("gpt_oss", {"rope.scaling.type": "none"}, "rope.scaling.factor: 4.0 is not supported"),
    ("llama4_text", {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, "rope.scaling.factor: 4.0"),
    ("llama4_text", {"rope.dimension_count_swa": 8}, "rope.dimension_count_swa is 8, expected 16"),
    ("gemma2", {WINDOW: 0}, f"field {WINDOW}: expected an integer above 0 in this architecture, got 0"),
    ("gpt_oss", {WINDOW: 0}, f"field {WINDOW}: expected an integer above 0"),
    ("cohere2", {WINDOW: None}, f"field {WINDOW}: expected an integer above 0"),
    ("gemma3_text", {MAGNITUDE: 1.5}, f"{MAGNITUDE}: 1.5 is not supported: llama.cpp applies it to windows too"),
    ("qwen3_5_text", {_SECTIONS: [4, 4, 0, 0]}, rf"{_SECTIONS}: \[4, 4, 0, 0\] is not supported"),
    ("qwen3_5_moe_text", {_SECTIONS: [2, 2, 2, 2]}, rf"{_SECTIONS}: \[2, 2, 2, 2\] is not supported"),
    ("qwen3_5_text", {_SECTIONS: [0, 0, 0, 0]}, rf"{_SECTIONS}: \[0, 0, 0, 0\] is not supported"),
]
_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}


def fields(**more: Any) -> dict[str, Any]:
    """The fields of a file of any of the architectures above."""
    own = {"block_count": 4, "attention.head_count": 2, "embedding_length": 32, "context_length": 96, RMS_EPSILON: 1e-6}
    own |= {"attention.key_length": 16, "rope.dimension_count": 16, WINDOW: 8, "feed_forward_length": 64}
    own |= {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 32, "logit_scale": 0.5}
    own |= {_SECTIONS: np.array([3, 3, 2, 0])} | _YARN
    return {key: each for key, each in (own | more).items() if each is not None}


@pytest.mark.parametrize(("family", "changes", "reason"), _FIELDS)
def test_fields_with_another_meaning_in_llama_cpp(family: str, changes: dict[str, Any], reason: str) -> None:
    config_of(FAMILIES[family], GgufModel(fields(), (), {}))
    with pytest.raises(RkfError, match=reason):
        config_of(FAMILIES[family], GgufModel(fields(**changes), (), {}))


def test_sections_and_magnitudes_that_change_nothing() -> None:
    """More sections than pairs turn all of them, and a model without windows has one rope."""
    wide = fields(**{_SECTIONS: np.array([11, 11, 10, 0])})
    assert config_of(FAMILIES["qwen3_5_text"], GgufModel(wide, (), {})) == config_of(
        FAMILIES["qwen3_5_text"], GgufModel(fields(), (), {})
    )
    full = fields(**{WINDOW: None, MAGNITUDE: 1.5})
    rope = config_of(FAMILIES["gemma3_text"], GgufModel(full, (), {}))["rope_parameters"]["full_attention"]
    assert rope["attention_factor"] == pytest.approx(1.5 * (0.1 * np.log(4) + 1))


def test_what_is_computed_in_another_way_than_llama_cpp_is_told(tmp_path: Path) -> None:
    notes = FAMILIES["gpt_oss"].gguf.notes
    assert notes(fields()) == open_source(written(tmp_path, "gpt_oss")).notes
    assert "llama.cpp rounds them" in notes(fields())[0]
    assert notes(fields(**{"rope.scaling.type": "linear"})) == notes(fields(**{"rope.scaling.factor": 1.0})) == ()
    for family in ("qwen3_5_text", "qwen3_5_moe_text"):
        notes = FAMILIES[family].gguf.notes
        assert notes(fields()) == notes(fields(**{RMS_EPSILON: float(np.float32(1e-5))})) == ()
        assert "llama.cpp takes it in linear attention too" in notes(fields(**{RMS_EPSILON: 1e-3}))[0]


# Keys of a variant -> why there is no GGUF of it.
_KEYS: list[tuple[str, dict[str, Any], str]] = [
    (
        "olmo2",
        {"rope_parameters": LLAMA3},
        "rope scaling 'llama3' is not supported: llama.cpp has no tensor rope_freqs",
    ),
    ("ernie4_5_moe", {"moe_layer_interval": 2}, "moe_layer_interval: 2 is not supported; expected 1"),
    ("qwen3_5", {"rms_norm_eps": 1e-3}, "rms_norm_eps: 0.001 is not supported; expected at most 1e-05"),
    ("qwen3_5", {"rope_parameters": _PARTIAL | {"mrope_section": [2, 2, 0]}}, r"mrope_section: \[2, 2, 0, 0\]"),
    (
        "gemma3",
        {"rope_parameters": {"full_attention": YARN | {"attention_factor": 1.5}}},
        "attention_factor, mscale: llama.cpp applies them in layers with a window too",
    ),
]


def written_fields(variant: str, **changes: Any) -> dict[str, Any]:
    """The fields of a GGUF of a variant with some keys changed."""
    name, keys = VARIANTS[variant]
    described = describe({"model_type": name, **COMMON, **keys, **changes}, "config.json")
    return dict(fields_of(described.family, described.keys).own)


@pytest.mark.parametrize(("variant", "changes", "reason"), _KEYS)
def test_keys_that_llama_cpp_cannot_follow(variant: str, changes: dict[str, Any], reason: str) -> None:
    written_fields(variant)
    with pytest.raises(UnsupportedError, match=reason):
        written_fields(variant, **changes)


@pytest.mark.parametrize(("pairs", "sections"), [(32, [11, 11, 10, 0]), (5, [2, 2, 1, 0]), (4, [2, 1, 1, 0])])
def test_sections_reach_all_pairs(pairs: int, sections: list[int]) -> None:
    rope = _PARTIAL | {"partial_rotary_factor": pairs / 32}
    assert written_fields("qwen3_5", head_dim=64, rope_parameters=rope)[_SECTIONS] == sections
