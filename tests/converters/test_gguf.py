"""GGUF files: every tensor type, the rope order of q and k, configurations, and each refusal."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from gguf import quants
from tokenizers import Tokenizer

from rkf.converters.families.gguf_rope import llama3_divisors, llama3_parameters
from rkf.converters.families.layout_transforms import Unpermuted
from rkf.converters.gguf_header import GgufTexts, read_header
from rkf.converters.source import open_source
from rkf.errors import NotRkfError, RkfError, SourceError, UnsupportedError
from rkf.format.matrix import to_f32
from rkf.model.ops import Attention, Norm

from .conftest import gguf_permute, random_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
DOWN = "model.layers.0.mlp.down_proj.weight"
DEQUANTISABLE = [*quants._type_traits]


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_of_the_model_it_was_written_from(gguf_file: Callable[..., Path], family: str) -> None:
    model = random_model(family)
    source = open_source(gguf_file(family, model=model))
    state = model.state_dict()
    assert set(source.tensors) | set(source.aliases) == set(state)
    for name in source.tensors:
        np.testing.assert_array_equal(source.read(name).decode(), state[name].numpy())


def test_tensors_are_those_that_transformers_loads(gguf_file: Callable[..., Path]) -> None:
    q, k = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "qk")
    path = gguf_file("llama", kinds={q: Type.Q8_0, k: Type.Q4_1, DOWN: Type.Q5_0})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    source = open_source(path)
    for name, tensor in loaded.state_dict().items():
        np.testing.assert_array_equal(source.read(name).decode(), tensor.numpy())


@pytest.mark.parametrize("kind", DEQUANTISABLE, ids=lambda kind: kind.name)
def test_every_type_that_gguf_dequantises(gguf_file: Callable[..., Path], kind: Type) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (64, 768 // block * block_bytes), np.uint8)

    def add(writer: gguf.GGUFWriter) -> None:
        del writer.tensors[-1]["blk.0.ffn_down.weight"]
        writer.add_tensor("blk.0.ffn_down.weight", raw, raw_dtype=kind)

    source = open_source(gguf_file(intermediate_size=768, edit=add))
    spec, tensor = source.tensors[DOWN], source.read(DOWN)
    with np.errstate(all="ignore"):
        expected = quants.dequantize(raw, kind)
    assert (spec.stored_type, spec.stored_bytes, spec.shape) == (kind.name, raw.nbytes, (64, 768))
    assert tensor.dtype == spec.dtype
    np.testing.assert_array_equal(tensor.decode(), expected)


def test_sixteen_bit_types_stay_as_they_are(gguf_file: Callable[..., Path]) -> None:
    up = "model.layers.0.mlp.up_proj.weight"
    source = open_source(gguf_file(kinds={DOWN: Type.F16, up: Type.BF16}))
    assert (source.read(DOWN).dtype, source.tensors[DOWN].dense_bytes) == ("f16", 64 * 96 * 2)
    assert (source.read(up).dtype, source.tensors[up].dense_bytes) == ("bf16", 64 * 96 * 2)


def test_rope_rows_undo_what_llama_cpp_does() -> None:
    rows = np.arange(6 * 16 * 3, dtype=np.float32).reshape(6 * 16, 3)
    np.testing.assert_array_equal(Unpermuted(6).apply(gguf_permute(rows, 6)), rows)
    np.testing.assert_array_equal(Unpermuted(6).undo(rows), gguf_permute(rows, 6))


def test_biases_of_q_and_k_are_permuted_too(gguf_file: Callable[..., Path]) -> None:
    model = random_model("llama", attention_bias=True)
    source, state = open_source(gguf_file(model=model)), model.state_dict()
    for part in "qkvo":
        name = f"model.layers.1.self_attn.{part}_proj.bias"
        np.testing.assert_array_equal(source.read(name).data, state[name].numpy())


@pytest.mark.parametrize("family", FAMILIES)
def test_model(gguf_file: Callable[..., Path], family: str) -> None:
    model = open_source(gguf_file(family)).model
    assert model.family == ("llama" if family == "mistral" else family)
    (attention,) = (op for op in model.program.layer(1) if isinstance(op, Attention))
    assert (model.layers, attention.heads, attention.kv_heads) == (2, 4, 2)
    assert attention.head_dim == (32 if family == "qwen3" else 16)
    assert (model.vocab_size, model.context_length, attention.window) == (384, 256, None)
    assert model.program.ropes[0].frequencies[0] == 1
    norm = model.program.top[0]
    assert isinstance(norm, Norm)
    assert norm.epsilon == (1e-5 if family == "llama" else 1e-6)
    assert (model.bos_id, model.eos_ids, model.add_bos) == (1, (2, 0), False)
    assert {name: token.text for name, token in model.special_tokens.items()} == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
    }


def _set(key: str, value: Any) -> Callable[[gguf.GGUFWriter], None]:
    return _fields({key: value})


def _fields(fields: Mapping[str, Any]) -> Callable[[gguf.GGUFWriter], None]:
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
    kinds[str] = gguf.GGUFValueType.STRING
    return lambda writer: writer.kv_data[-1].update(
        {key: gguf.GGUFValue(each, kinds[type(each)]) for key, each in fields.items()}
    )


_YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 64}


@pytest.mark.parametrize(
    ("fields", "slower", "factor"),
    [
        ({"factor": 4.0}, 4, 1),  # "linear" is the type without one
        ({"scale_linear": 4.0}, 4, 1),  # of old files
        ({"scale_linear": 4.0, "factor": 0.0}, 1, 1),
        ({"type": "linear"}, 1, 1),
        ({"type": "none", "factor": 4.0}, 1, 1),
        ({"type": "yarn"}, 1, 1),
        (_YARN, 4, 0.1 * np.log(4) + 1),
        (_YARN | {"attn_factor": 1.5}, 4, 0.15 * np.log(4) + 1.5),
        # It reads these in other architectures alone.
        (_YARN | {"yarn_attn_factor": 2.0, "yarn_log_multiplier": 0.5}, 4, 0.1 * np.log(4) + 1),
    ],
)
def test_ropes_as_llama_cpp_reads_them(
    gguf_file: Callable[..., Path], fields: dict[str, Any], slower: float, factor: float
) -> None:
    """slower: how many times slower the last numbers of a head turn than without these fields."""
    names = {key: f"llama.rope.{'' if key == 'scale_linear' else 'scaling.'}{key}" for key in fields}
    edit = _fields({names[key]: each for key, each in fields.items()})
    plain, scaled = (open_source(gguf_file(edit=each)).model.program.ropes[0] for each in (None, edit))
    assert plain.frequencies[-1] / scaled.frequencies[-1] == pytest.approx(slower)
    assert scaled.factor == pytest.approx(factor, rel=1e-6)


def test_yarns_betas_are_those_that_llama_cpp_assumes(gguf_file: Callable[..., Path]) -> None:
    names = {f"llama.rope.scaling.{key}": each for key, each in _YARN.items()}
    tuned = names | {"llama.rope.scaling.yarn_beta_fast": 4.0, "llama.rope.scaling.yarn_beta_slow": 2.0}
    usual, same = (open_source(gguf_file(edit=_fields(each))).model.program.ropes for each in (names, tuned))
    assert usual == same


def test_a_field_with_the_same_number_for_each_layer(gguf_file: Callable[..., Path]) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
            each = writer.kv_data[-1].pop(f"llama.{key}").value
            writer.add_array(f"llama.{key}", [each] * 2)

    assert open_source(gguf_file(edit=edit)).model == open_source(gguf_file()).model


def test_a_field_of_old_files_that_says_nothing(gguf_file: Callable[..., Path]) -> None:
    edit = _set("llama.tensor_data_layout", "Meta AI original pth")
    assert open_source(gguf_file(edit=edit)).model == open_source(gguf_file()).model


def test_a_window_that_llama_cpp_ignores_is_told(gguf_file: Callable[..., Path]) -> None:
    source = open_source(gguf_file(edit=_set("llama.attention.sliding_window", 48)))
    assert source.notes == (
        "attention.sliding_window 48 is applied, as the reference of mistral does; llama.cpp ignores it here",
    )
    assert open_source(gguf_file()).notes == ()


def test_linear_rope_scaling_and_window(gguf_file: Callable[..., Path]) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.5)
        writer.add_sliding_window(48)

    plain, model = open_source(gguf_file()).model, open_source(gguf_file(edit=edit)).model
    assert model.family == "mistral"
    np.testing.assert_allclose(
        np.array(model.program.ropes[0].frequencies) * 2.5, plain.program.ropes[0].frequencies, rtol=1e-6
    )
    assert {op.window for op in model.program.layer(0) if isinstance(op, Attention)} == {48}


def llama3(factor: float, high: float, context: int, theta: float = 1e4) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


@pytest.mark.parametrize("scaling", [(8.0, 4.0, 8192), (32.0, 4.0, 8192), (4.0, 8.0, 2048)])
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 5e5), (128, 5e5), (128, 1e4)])
def test_rope_factors_give_the_scaling_back(scaling: tuple[float, float, int], head_dim: int, theta: float) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = llama3(*scaling, theta)
    theirs = transformers.LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, rope_parameters=dict(rope))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, device=torch.device("cpu"))
    plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    np.testing.assert_allclose(plain / llama3_divisors(rope, head_dim), scaled.numpy(), rtol=1e-5)
    assert llama3_parameters(llama3_divisors(rope, head_dim).astype(np.float32), theta, head_dim) == rope


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (np.linspace(1, 3, 8), "fits no llama3"),
        (np.linspace(3, 1, 8), "fits no llama3"),
        (np.ones(7), "expected 8 divisors"),
        (np.zeros(8), "of at least 1"),
        (np.full(8, np.nan), "of at least 1"),
    ],
)
def test_rope_factors_of_another_kind_are_refused(
    gguf_file: Callable[..., Path], factors: np.ndarray, message: str
) -> None:
    path = gguf_file(edit=lambda writer: writer.add_tensor("rope_freqs.weight", factors.astype(np.float32)))
    with pytest.raises(SourceError, match=message):
        open_source(path)


def test_rope_factors_in_a_file(gguf_file: Callable[..., Path]) -> None:
    factors = llama3_divisors(llama3(8.0, 4.0, 8192), 16).astype(np.float32)
    plain = open_source(gguf_file()).model.program.ropes[0].frequencies
    source = open_source(gguf_file(edit=lambda writer: writer.add_tensor("rope_freqs.weight", factors)))
    np.testing.assert_allclose(source.model.program.ropes[0].frequencies, plain / factors, rtol=1e-5)
    assert "rope_freqs.weight" not in source.tensors


def test_header_is_what_gguf_py_reads(gguf_file: Callable[..., Path]) -> None:
    path = gguf_file("qwen3", kinds={DOWN: Type.Q8_0})
    reader, header = gguf.GGUFReader(path), read_header(path)
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    arrays = (np.ndarray, GgufTexts)
    assert {key: list(v) if isinstance(v, arrays) else v for key, v in header.fields.items()} == theirs
    assert [tensor.name for tensor in reader.tensors] == list(header.tensors)
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert (ours.type, list(ours.shape)) == (tensor.tensor_type, tensor.shape.tolist()[::-1])
        assert ours.stored(path).tobytes() == tensor.data.tobytes()


def _replace(writer: gguf.GGUFWriter, key: str, values: list[Any]) -> None:
    del writer.kv_data[-1][key]
    writer.add_array(key, values)


REFUSALS: dict[str, tuple[dict[str, Any], type[RkfError], str]] = {
    "big-endian": ({"endianess": gguf.GGUFEndian.BIG}, SourceError, "big-endian"),
    "split": ({"edit": _set("split.count", 2)}, UnsupportedError, "one of 2 parts"),
    "an adapter": ({"edit": lambda w: w.add_type("adapter")}, UnsupportedError, "not a model but a LoRA adapter"),
    "an imatrix": ({"edit": lambda w: w.add_type("imatrix")}, UnsupportedError, "statistics for quantisation"),
    "a control vector": (
        {"edit": _fields({"controlvector.model_hint": 1, "general.architecture": "controlvector"})},
        UnsupportedError,
        "not a model but a control vector",
    ),
    "a vocabulary alone": ({"edit": lambda w: w.tensors[-1].clear()}, SourceError, "no tensors, expected the weights"),
    "experts": ({"edit": _set("llama.expert_count", 8)}, SourceError, "num_experts_per_tok"),
    "partial rope": ({"edit": _set("llama.rope.dimension_count", 8)}, UnsupportedError, "rope.dimension_count"),
    "a magnitude without yarn": (
        {"edit": _set("llama.rope.scaling.attn_factor", 1.5)},
        UnsupportedError,
        "attn_factor: 1.5 is not supported with rope scaling 'linear'",
    ),
    "one of two lists": (
        {"edit": lambda w: w.add_tensor("rope_factors_long.weight", np.ones(8, np.float32))},
        SourceError,
        "rope_factors_short.weight: expected both or none",
    ),
    "attention to later tokens": (
        {"edit": _set("llama.attention.causal", False)},
        UnsupportedError,
        "attention.causal is false",
    ),
    "groups of experts": (
        {"edit": _fields({"llama.expert_count": 8, "llama.expert_used_count": 2, "llama.expert_group_count": 2})},
        UnsupportedError,
        "expert_group_count: 2 is not supported",
    ),
    "heads that differ": (
        {"edit": lambda w: _replace(w, "llama.attention.head_count", [4, 2])},
        UnsupportedError,
        "attention.head_count: expected an integer",
    ),
    "widths that differ": (
        {"edit": lambda w: _replace(w, "llama.feed_forward_length", [96, 64])},
        UnsupportedError,
        "feed_forward_length: layers of different sizes",
    ),
    "heads of other layers": (
        {"edit": lambda w: _replace(w, "llama.attention.head_count", [4, 4, 4])},
        SourceError,
        "field attention.head_count: expected 2 numbers, one for each layer",
    ),
    "true layers": (
        {"edit": lambda w: (w.kv_data[-1].pop("llama.block_count"), w.add_bool("llama.block_count", True))},
        SourceError,
        "field llama.block_count: expected an integer, got True",
    ),
    "fractions for types": (
        {"edit": lambda w: _replace(w, "tokenizer.ggml.token_type", [1.5] * 384)},
        SourceError,
        "field tokenizer.ggml.token_type: expected a list of integers",
    ),
    "kind of rope": (
        {"edit": lambda w: w.add_string("llama.rope.scaling.type", "spiral")},
        UnsupportedError,
        "rope scaling 'spiral'",
    ),
    "unknown tensor": (
        {"edit": lambda w: w.add_tensor("blk.0.attn_qkv.weight", np.zeros(4, np.float32))},
        UnsupportedError,
        "attn_qkv",
    ),
    "integers": (
        {"edit": lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(64, np.int32))},
        SourceError,
        "I32 cannot be dequantised",
    ),
    "a layer too many": ({"edit": _set("llama.block_count", 3)}, SourceError, "is missing"),
    "heads": (
        {"edit": _set("llama.attention.head_count_kv", 3)},
        SourceError,
        "num_key_value_heads: expected a divisor",
    ),
    "a word for a number": (
        {"edit": lambda w: w.add_string("llama.rope.freq_base", "x")},
        SourceError,
        "field llama.rope.freq_base: expected a finite number",
    ),
    "no number": ({"edit": lambda w: w.add_rope_freq_base(float("nan"))}, SourceError, "true or false, got nan"),
    "a list for a number": (
        {"edit": lambda w: w.add_array("llama.expert_count", [0, 0])},
        SourceError,
        "field llama.expert_count: expected a finite number or true or false, got a list of 2",
    ),
    "type of the alignment": (
        {"edit": lambda w: w.add_uint64("general.alignment", 32)},
        SourceError,
        "general.alignment: expected type UINT32, got UINT64",
    ),
    "name of a tensor": (
        {"edit": lambda w: w.add_tensor("x" * 64, np.zeros(4, np.float32))},
        SourceError,
        "more than 63 bytes",
    ),
    "another number of a layer": (
        {"edit": lambda w: w.add_tensor("blk.00.attn_norm.weight", np.zeros(64, np.float32))},
        UnsupportedError,
        "blk.00.attn_norm.weight is not part of the model",
    ),
    "more tokens than rows": ({"vocab_size": 380}, SourceError, "384 tokens"),
    "pre-tokenizer": ({"pre": "martian"}, UnsupportedError, "pre-tokenizer 'martian'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(gguf_file: Callable[..., Path], case: str) -> None:
    options, error, message = REFUSALS[case]
    path = gguf_file(**options)
    with pytest.raises(error, match=message) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("offset", [0, 4, 1 << 40])
def test_tensors_lie_one_after_the_other(gguf_file: Callable[..., Path], offset: int) -> None:
    """As in ggml: no tensor over another one, off the alignment, out of order, or behind a gap."""
    path = gguf_file()
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.1.ffn_up.weight") + len("blk.1.ffn_up.weight") + 4 + 2 * 8 + 4
    data[at : at + 8] = offset.to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(SourceError, match=f"blk.1.ffn_up.weight: expected offset .* got {offset}"):
        open_source(path)


def test_special_tokens_are_corrected_as_in_llama_cpp(gguf_file: Callable[..., Path]) -> None:
    """By their texts, whatever their types; a text with a space is one token; ids past the tokens are ignored."""

    def edit(writer: gguf.GGUFWriter) -> None:
        fields = writer.kv_data[-1]
        tokens = fields["tokenizer.ggml.tokens"].value
        tokens[300:306] = ["<|end|>", "<|call|>", "<|return|>", "<PAD>", "< s >", "<|channel|>"]
        fields["tokenizer.ggml.merges"].value[:] = ["a b"]
        tokens[310] = "ab"
        fields["tokenizer.ggml.token_type"].value[:] = [gguf.TokenType.NORMAL] * 384
        writer.add_bool("tokenizer.ggml.add_bos_token", True)
        _set("tokenizer.ggml.bos_token_id", 304)(writer)
        _set("tokenizer.ggml.padding_token_id", 2**32 - 1)(writer)

    source = open_source(gguf_file(edit=edit))
    assert source.model.eos_ids == (2, 0, 301, 302, 303)
    assert source.notes == ("tokenizer.ggml.padding_token_id: 4294967295 is past the 384 tokens, so it is ignored",)
    tokenizer = Tokenizer.from_buffer(source.tokenizer_json)
    assert tokenizer.encode("<|end|><|return|><PAD><|channel|>").ids == [304, 300, 302, 303, 305]
    assert tokenizer.decode([300, 302, 303, 305]) == "<|end|><|channel|>"


def test_a_name_that_is_not_utf8(gguf_file: Callable[..., Path], tmp_path: Path) -> None:
    path = gguf_file()
    source = open_source(path.rename(tmp_path / os.fsdecode(b"s\xff.gguf")))
    assert (source.label, list(source.files)) == ("s\\xff.gguf", ["s\\xff.gguf"])
    assert len(source.fingerprint) == 64


def test_unknown_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "bloom")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="architecture 'bloom'"):
        open_source(tmp_path / "a.gguf")


def test_unknown_tensor_type(gguf_file: Callable[..., Path]) -> None:
    path = gguf_file()
    data = bytearray(path.read_bytes())
    name = b"blk.0.ffn_down.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    data[at : at + 4] = (99).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"blk\.0\.ffn_down\.weight: unknown tensor type 99"):
        open_source(path)


def test_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    pointer = b"version https://git-lfs.github.com/spec/v1"
    kinds = ((b"", "nor GGUF"), (b"GG", "nor"), (b"<!DOCTYPE html>", "nor"), (pointer, "git lfs pull"))
    for content, problem in (*kinds, (b"\x89RKF\r\n\x1a\n\0", "an rkf file already")):
        path.write_bytes(content)
        with pytest.raises(NotRkfError, match=problem):
            open_source(path)
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(SourceError, match="truncated"):
        open_source(path)
    path.write_bytes(b"GGUF\x09\x00\x00\x00")
    with pytest.raises(SourceError, match="version 9"):
        open_source(path)
    with pytest.raises(SourceError, match=f"give one of its GGUF files: {path.name}"):
        open_source(tmp_path)


def test_every_truncation_of_the_header_is_refused(gguf_file: Callable[..., Path], tmp_path: Path) -> None:
    path = gguf_file()
    data = path.read_bytes()
    end = min(tensor.offset for tensor in read_header(path).tensors.values())
    for length in [*range(8, end, 97), end, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(SourceError):
            read_header(path)


def test_forged_counts_are_refused_at_once(gguf_file: Callable[..., Path]) -> None:
    path = gguf_file()
    data = path.read_bytes()
    key = b"tokenizer.ggml.tokens"
    for at in (8, 16, data.index(key) + len(key) + 8, 24):
        forged = bytearray(data)
        forged[at : at + 8] = (1 << 62).to_bytes(8, "little")
        path.write_bytes(forged)
        with pytest.raises(SourceError, match="remain"):
            read_header(path)


def test_dense_values_are_exact_in_their_dtype(gguf_file: Callable[..., Path]) -> None:
    source = open_source(gguf_file(kinds={DOWN: Type.Q4_0}))
    tensor = source.read(DOWN)
    assert tensor.dtype == "f32"
    raw = read_header(source.path).tensors["blk.0.ffn_down.weight"].stored(source.path)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(to_f32(tensor.data, "f32"), quants.dequantize(raw, Type.Q4_0))
