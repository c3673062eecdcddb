"""Hugging Face folders: every value equals transformers', and every refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, processors

from rkf.converters.export import export_hf
from rkf.converters.pipeline import convert
from rkf.converters.source import open_source
from rkf.errors import RkfError, SourceError, UnsupportedError, UsageError
from rkf.model.ops import Attention
from rkf.model.program import Program

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_tensor_is_the_one_that_transformers_loads(
    hf_folder: Callable[..., Path], family: str, dtype: str
) -> None:
    folder = hf_folder(family, dtype)
    source = open_source(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).state_dict()
    assert set(source.tensors) | set(source.aliases) == set(loaded)
    assert list(source.tensors) == sorted(source.tensors)
    for name, spec in source.tensors.items():
        tensor = source.read(name)
        assert tensor.dtype == spec.dtype == {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[dtype]
        assert tensor.shape == spec.shape
        np.testing.assert_array_equal(tensor.decode(), loaded[name].float().numpy())


def windows(program: Program) -> list[int | None]:
    """The window of each layer."""
    return [op.window for number in range(program.layers) for op in program.layer(number) if isinstance(op, Attention)]


def test_config_fields(hf_folder: Callable[..., Path]) -> None:
    model = open_source(hf_folder("qwen3")).model
    (attention,) = (op for op in model.program.layer(1) if isinstance(op, Attention))
    assert (model.layers, attention.heads, attention.kv_heads, attention.head_dim) == (2, 4, 2, 32)
    assert (model.family, model.vocab_size, model.context_length) == ("qwen3", 384, 256)
    assert (model.bos_id, model.eos_ids, model.add_bos) == (1, (2, 0), False)
    assert windows(open_source(hf_folder("mistral")).model.program) == [32, 32]


def test_keys_that_the_reference_ignores(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama")
    before = open_source(folder).model
    edit_json(folder / "config.json", num_local_experts=8, pretraining_tp=2, query_pre_attn_scalar=3, sliding_window=7)
    edit_json(folder / "config.json", partial_rotary_factor=0.5)
    assert open_source(folder).model == before


def test_biases_of_every_projection(hf_folder: Callable[..., Path]) -> None:
    source = open_source(hf_folder("llama", attention_bias=True, mlp_bias=True))
    assert len([name for name in source.tensors if name.endswith(".bias")]) == 2 * 7


def test_tied_embeddings_are_an_alias(hf_folder: Callable[..., Path]) -> None:
    source = open_source(hf_folder("qwen2"))
    assert source.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert open_source(hf_folder("llama")).aliases == {}


@pytest.mark.parametrize("stored", ["both, equal", "both, other values", "head", "embedding"])
def test_a_head_stored_beside_the_word_tied(hf_folder: Callable[..., Path], tmp_path: Path, stored: str) -> None:
    folder = hf_folder("llama", "float32")
    edit_json(folder / "config.json", tie_word_embeddings=True)
    held = load_file(folder / "model.safetensors")
    if "equal" in stored:
        held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    elif "both" not in stored:
        del held[{"head": "model.embed_tokens.weight", "embedding": "lm_head.weight"}[stored]]
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_source(folder)
    assert bool(source.aliases) == (stored != "both, other values")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name in loaded:
        found = source.read(source.aliases.get(name, name)).decode()
        np.testing.assert_array_equal(found, loaded[name].numpy(), err_msg=name)
    convert(folder, tmp_path / "m.rkf", recipe="dense")
    export_hf(tmp_path / "m.rkf", tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(loaded[name], back[name]) for name in loaded)


def test_label_of_a_snapshot_names_the_model(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    snapshots = tmp_path / "models--org--name" / "snapshots"
    snapshots.mkdir(parents=True)
    assert open_source(hf_folder("llama").rename(snapshots / f"{7:040}")).label == "org/name@000000000000"


def test_shards(hf_folder: Callable[..., Path]) -> None:
    whole, parts = hf_folder("llama"), hf_folder("llama", shard="60KB")
    assert len(list(parts.glob("model-*.safetensors"))) > 2
    one, many = open_source(whole), open_source(parts)
    assert one.tensors == many.tensors
    for name in one.tensors:
        np.testing.assert_array_equal(one.read(name).data, many.read(name).data)
    assert one.fingerprint != many.fingerprint
    assert set(many.files) >= {path.name for path in parts.glob("*.safetensors")} | {"config.json", "tokenizer.json"}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 5e5,
        },
    ],
)
def test_rope_scaling_in_both_spellings(hf_folder: Callable[..., Path], rope: dict[str, Any]) -> None:
    folder = hf_folder("llama", rope_parameters=rope)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq.numpy()
    expected = open_source(folder).model.program
    np.testing.assert_allclose(expected.ropes[0].frequencies, theirs, rtol=1e-6)
    # transformers before 5 wrote rope_theta beside rope_scaling, and before 4.43 "type".
    old = {("type" if key == "rope_type" else key): value for key, value in rope.items() if key != "rope_theta"}
    edit_json(folder / "config.json", rope_parameters=None, rope_scaling=old, rope_theta=rope["rope_theta"])
    assert open_source(folder).model.program == expected


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"use_sliding_window": False}, [None, None]),
        ({"use_sliding_window": True, "sliding_window": None}, [None, None]),
        ({"use_sliding_window": True, "max_window_layers": 0}, [64, 64]),
        ({"use_sliding_window": True, "max_window_layers": 1}, [None, 64]),
        ({"use_sliding_window": True, "max_window_layers": 2}, [None, None]),
        ({"use_sliding_window": True}, [None, None]),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, [64, 64]),
        ({"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}, [None, 64]),
    ],
)
def test_sliding_window_of_qwen(
    hf_folder: Callable[..., Path], changes: dict[str, Any], window: list[int | None]
) -> None:
    folder = hf_folder("qwen2")
    config = json.loads((folder / "config.json").read_text())
    for key in ("layer_types", "use_sliding_window", "max_window_layers"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 64, **changes}))
    assert windows(open_source(folder).model.program) == window


def test_mistral_has_a_window_unless_it_says_otherwise(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("mistral")
    edit_json(folder / "config.json", sliding_window=None)
    assert windows(open_source(folder).model.program) == [None, None]
    config = json.loads((folder / "config.json").read_text())
    del config["sliding_window"]
    (folder / "config.json").write_text(json.dumps(config))
    assert windows(open_source(folder).model.program) == [4096, 4096]


def test_generation_config_and_token_ids(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama")
    edit_json(folder / "generation_config.json", eos_token_id=[9, 2], temperature=0.6, top_p=0.9, do_sample=True)
    model = open_source(folder).model
    assert model.eos_ids == (9, 2, 0)  # the last is known by its text, as in llama.cpp
    assert model.generation == {"temperature": 0.6, "top_k": 50, "top_p": 0.9}
    edit_json(folder / "generation_config.json", do_sample=False, repetition_penalty=1.1, top_k="50")
    assert open_source(folder).model.generation == {"repetition_penalty": 1.1}
    edit_json(folder / "generation_config.json", do_sample=True)
    assert open_source(folder).notes == ("generation_config.json: top_k: expected an integer, got '50'; it is ignored",)


def test_options_that_rkf_does_not_follow_are_told(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama")
    path = folder / "generation_config.json"
    neutral = {"typical_p": 1.0, "num_beams": 1, "min_length": 0, "bad_words_ids": None, "suppress_tokens": []}
    edit_json(path, do_sample=True, **neutral)
    assert open_source(folder).notes == ()
    edit_json(path, typical_p=0.9, suppress_tokens=[5, 6], forced_bos_token_id=0, temperature=0.5)
    told = "generation_config.json: forced_bos_token_id, suppress_tokens, typical_p: not known to rkf; ignored"
    assert open_source(folder).notes == (told,)
    edit_json(path, do_sample=None, suppress_tokens=None, forced_bos_token_id=None)
    told = "generation_config.json: temperature, typical_p: of no effect without do_sample, so texts are greedy"
    assert open_source(folder).notes == (told,)
    edit_json(path, temperature=1.0, top_k=50, top_p=1.0, typical_p=1.0)  # the reference's own defaults
    assert open_source(folder).notes == ()


def test_ids_past_the_vocabulary_are_ignored_as_in_transformers(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama")
    edit_json(folder / "config.json", bos_token_id=-1, eos_token_id=2**32 - 1)
    for name in ("generation_config.json", "tokenizer_config.json"):
        (folder / name).unlink()
    source = open_source(folder)
    assert (source.model.bos_id, source.model.eos_ids) == (None, (0, 2))
    assert source.notes == ("token ids past the 384 rows of the embedding are ignored: 4294967295",)


TOKEN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
SPECIAL = {**TOKEN, "special": True, "__type": "AddedToken"}
OLD_NAMES = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", **TOKEN}}
# File -> what it holds. <plain> is a token of tokenizer.json that is not special, <new> is no token of it.
NAMES: dict[str, dict[str, Any]] = {
    "settings": {"tokenizer_config.json": {"eos_token": "<|im_end|>", "pad_token": "<new>", "unk_token": None}},
    "older map alone": {"special_tokens_map.json": OLD_NAMES},
    "older map first": {"tokenizer_config.json": {"bos_token": "<|endoftext|>"}, "special_tokens_map.json": OLD_NAMES},
    "map ignored": {
        "tokenizer_config.json": {"bos_token": "<|endoftext|>", "added_tokens_decoder": {}},
        "special_tokens_map.json": OLD_NAMES,
    },
    "decoder": {"tokenizer_config.json": {"added_tokens_decoder": {"2": {"content": "the", "special": True, **TOKEN}}}},
    "older added tokens": {"added_tokens.json": {"<new>": 385, "the": 300}},
    "list": {"tokenizer_config.json": {"additional_special_tokens": ["<new>"]}},
    "further names": {"tokenizer_config.json": {"extra_special_tokens": {"image_token": "<new>"}}},
    "own names": {"tokenizer_config.json": {"image_token": "the", "add_bos_token": True, "boi_token": 3}},
    "named, not special": {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<plain>",
            "pad_token": {"content": "a", **SPECIAL},
        }
    },
    "named, not special in the decoder": {
        "tokenizer_config.json": {
            "eos_token": "<plain>",
            "added_tokens_decoder": {"384": {"content": "<plain>", **TOKEN, "lstrip": True}},
        }
    },
    "listed, not special": {"tokenizer_config.json": {"extra_special_tokens": ["<plain>", "<new>"]}},
    "in the reference's order": {
        "tokenizer_config.json": {"extra_special_tokens": ["<new>"], "pad_token": "<pad>", "bos_token": "<bos>"}
    },
    "one list of two": {
        "tokenizer_config.json": {"additional_special_tokens": ["<other>"], "extra_special_tokens": ["<new>"]}
    },
}


@pytest.mark.parametrize("case", NAMES)
def test_special_tokens_are_those_of_transformers(hf_folder: Callable[..., Path], case: str) -> None:
    folder = hf_folder("llama", vocab_size=400)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<plain>", special=False, normalized=True, rstrip=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in NAMES[case].items():
        (folder / name).write_text(json.dumps(content))
    source, theirs = open_source(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert {name: token.text for name, token in source.model.special_tokens.items()} == theirs.special_tokens_map
    ours = Tokenizer.from_buffer(source.tokenizer_json)
    text = "a<new> the<|im_end|>b <plain> <bos><pad><other>"
    ids = ours.encode(text).ids
    assert ids == theirs.encode(text)
    assert ours.get_added_tokens_decoder().keys() == theirs.added_tokens_decoder.keys()
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert source.model.add_bos is False


def test_what_settings_would_change_in_texts_is_refused_or_told(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama")
    edit_json(folder / "tokenizer_config.json", clean_up_tokenization_spaces=True)
    assert open_source(folder).notes == ()  # the reference ignores it beside a BPE
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    tokenizer.save(str(folder / "tokenizer.json"))
    told = "tokenizer_config.json: clean_up_tokenization_spaces is ignored: texts keep the spaces of their tokens"
    assert told in open_source(folder).notes
    edit_json(folder / "tokenizer_config.json", split_special_tokens=True)
    with pytest.raises(UnsupportedError, match=r"tokenizer_config\.json: split_special_tokens: True is not supported"):
        open_source(folder)


def test_the_token_that_tokenizer_json_puts_first_is_bos(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    model = open_source(folder).model
    assert (model.bos_id, model.add_bos) == (0, True)


def test_tokens_past_the_rows_are_left_out(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<{number}>" for number in range(384 - tokenizer.get_vocab_size() + 1)])
    last = tokenizer.id_to_token(384)
    tokenizer.save(str(folder / "tokenizer.json"))
    source = open_source(folder)
    assert Tokenizer.from_buffer(source.tokenizer_json).get_vocab_size() == 384
    assert source.notes == (f"tokenizer.json: tokens past the 384 rows of the embedding are left out: '{last}'",)


def test_chat_template_from_each_place(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama")
    assert open_source(folder).chat_template == "{{ messages }}"
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}, {"name": []}, None]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    assert open_source(folder).chat_template == "d"
    assert open_source(folder).notes == ("of several chat templates only the default one is kept, without 'tool'",)
    edit_json(folder / "tokenizer_config.json", chat_template=None)
    assert open_source(folder).chat_template is None
    edit_json(folder / "chat_template.json", chat_template="j")
    assert open_source(folder).chat_template == "j"
    (folder / "chat_template.jinja").write_text("own é")
    assert open_source(folder).chat_template == "own é"
    assert open_source(folder).notes == ()
    (folder / "additional_chat_templates").mkdir()
    for name in ("default", "rag", "tool_use"):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text("x")
    assert open_source(folder).notes[0].endswith("is kept, without 'rag', 'tool_use'")


def test_rotary_frequencies_of_old_checkpoints_are_left_out(hf_folder: Callable[..., Path]) -> None:
    from safetensors.numpy import save_file

    folder = hf_folder("llama", shard="60KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({name: np.ones(8, np.float32)}, folder / "model-old.safetensors")
    index["weight_map"][name] = "model-old.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert name not in open_source(folder).tensors


def test_tensors_that_the_reference_leaves_out(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama")
    path = folder / "model.safetensors"
    whole = open_source(folder)
    extra = {
        "model.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.self_attn.bias": torch.ones(2, dtype=torch.int64),
    }
    save_file(load_file(path) | extra, path)
    (folder / "model.safetensors.index.json").write_text("{}")  # of another build
    source = open_source(folder)
    assert source.tensors == whole.tensors
    assert source.notes == (
        "model.safetensors.index.json is ignored beside model.safetensors",
        f"tensors that the configuration does not describe are left out: {', '.join(map(repr, extra))}",
    )
    edit_json(folder / "config.json", num_hidden_layers=1)
    assert open_source(folder).model.layers == 1


def test_names_without_their_prefix(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("qwen2")
    path, whole = folder / "model.safetensors", open_source(folder)
    save_file({name.removeprefix("model."): each for name, each in load_file(path).items()}, path)
    assert open_source(folder).tensors == whole.tensors


def test_names_with_their_prefix_twice(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama", tie_word_embeddings=False)
    path, whole = folder / "model.safetensors", open_source(folder)
    save_file({f"model.{name}": each for name, each in load_file(path).items()}, path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    source = open_source(folder)
    assert source.tensors == whole.tensors and not source.notes
    np.testing.assert_array_equal(source.read("lm_head.weight").decode(), theirs["lm_head.weight"].float().numpy())


def test_an_adapter(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/model"}))
    assert open_source(folder).notes == ("adapter_config.json: the adapter of org/model beside the model is left out",)
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match="an adapter of org/model without its model"):
        open_source(folder)


def _index(folder: Path, tensor: str, shard: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][tensor] = shard
    path.write_text(json.dumps(index))


def _missing_shard(folder: Path) -> None:
    next(folder.glob("model-00002*")).unlink()


def _only_pickle(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK")


def _truncate(folder: Path) -> None:
    shard = next(folder.glob("model-00001*"))
    shard.write_bytes(shard.read_bytes()[:-1])


REFUSALS: dict[str, tuple[Callable[[Path], Any], type[RkfError], str]] = {
    "missing shard": (_missing_shard, SourceError, "shard model-00002"),
    "path traversal": (lambda f: _index(f, "a", "../evil.safetensors"), SourceError, "plain name"),
    "absolute path": (lambda f: _index(f, "a", "/tmp/evil.safetensors"), SourceError, "plain name"),
    "windows path": (lambda f: _index(f, "a", "..\\evil.safetensors"), SourceError, "plain name"),
    "pickle in an index": (lambda f: _index(f, "a", "pytorch_model.bin"), SourceError, "plain name"),
    "only pickle": (_only_pickle, SourceError, "pickle"),
    "gptq": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq"}),
        SourceError,
        "already quantised .*gptq",
    ),
    "awq": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "awq"}),
        SourceError,
        "already quantised .*awq",
    ),
    "bitsandbytes": (
        lambda f: edit_json(f / "config.json", quantization_config={"load_in_4bit": True}),
        SourceError,
        "already quantised",
    ),
    "unknown architecture": (
        lambda f: edit_json(f / "config.json", model_type="mamba", auto_map={"AutoConfig": "evil.Config"}),
        UnsupportedError,
        "architecture 'mamba'",
    ),
    "activation": (lambda f: edit_json(f / "config.json", hidden_act="mish"), UnsupportedError, "hidden_act.*mish"),
    "kind of rope": (
        lambda f: edit_json(f / "config.json", rope_parameters={"rope_type": "spiral", "factor": 4.0}),
        UnsupportedError,
        "rope scaling 'spiral'",
    ),
    "a part of each head": (
        lambda f: edit_json(
            f / "config.json", rope_scaling={"rope_type": "linear", "factor": 4.0}, partial_rotary_factor=0.5
        ),
        UnsupportedError,
        "partial_rotary_factor",
    ),
    "a word for a boolean": (
        lambda f: edit_json(f / "config.json", tie_word_embeddings="false"),
        SourceError,
        "tie_word_embeddings: expected true or false, got 'false'",
    ),
    "forged layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=1 << 30), SourceError, "num_hidden_l"),
    "forged heads": (lambda f: edit_json(f / "config.json", head_dim=1 << 30), SourceError, "rotated values per head"),
    "rope is no object": (
        lambda f: edit_json(f / "config.json", rope_parameters="yarn"),
        SourceError,
        "rope_parameters: expected an object",
    ),
    "rope factor missing": (
        lambda f: edit_json(f / "config.json", rope_parameters={"rope_type": "linear"}),
        SourceError,
        "factor",
    ),
    "heads": (
        lambda f: edit_json(f / "config.json", num_key_value_heads=3),
        SourceError,
        "num_key_value_heads: expected a divisor",
    ),
    "dimension missing": (lambda f: edit_json(f / "config.json", hidden_size=None), SourceError, "hidden_size"),
    "shape": (lambda f: edit_json(f / "config.json", intermediate_size=97), SourceError, "expected shape"),
    "a layer too many": (lambda f: edit_json(f / "config.json", num_hidden_layers=3), SourceError, "is missing"),
    "no config": (lambda f: (f / "config.json").unlink(), SourceError, "config.json is missing"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), SourceError, "JSON object"),
    "a key twice": (
        lambda f: (f / "config.json").write_text('{"a": 1, "b": {"c": 1, "c": 2}}'),
        SourceError,
        "key 'c' occurs twice, with different values",
    ),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), SourceError, "not JSON"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), SourceError, "tokenizer.json is missing"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), SourceError, "Model missing"),
    "token id": (
        lambda f: edit_json(f / "config.json", bos_token_id="1"),
        SourceError,
        "bos_token_id: expected an int",
    ),
    "template is a number": (
        lambda f: edit_json(f / "tokenizer_config.json", chat_template=3),
        SourceError,
        "chat_template: expected a text, got 3",
    ),
    "half a character": (
        lambda f: edit_json(f / "tokenizer_config.json", chat_template="\ud800"),
        SourceError,
        "chat_template: expected a text",
    ),
    "name of a token": (
        lambda f: edit_json(f / "tokenizer_config.json", eos_token=["</s>"]),
        SourceError,
        "tokenizer_config.json: eos_token: expected a token",
    ),
    "added tokens": (
        lambda f: edit_json(f / "tokenizer_config.json", added_tokens_decoder={"x": {"content": "y"}}),
        SourceError,
        "added_tokens_decoder, x: expected an id",
    ),
    "template": (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), SourceError, "not UTF-8"),
    "truncated shard": (_truncate, SourceError, "truncated"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(sharded: Path, case: str) -> None:
    harm, error, message = REFUSALS[case]
    harm(sharded)
    with pytest.raises(error, match=message) as caught:
        open_source(sharded)
    assert "\n" not in str(caught.value)


@pytest.fixture
def sharded(hf_folder: Callable[..., Path]) -> Path:
    return hf_folder("llama", shard="60KB")


def test_dtype_that_is_not_a_float(sharded: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shard = next(sharded.glob("model-00001*"))
    name = next(iter(_names(shard)))
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    fields = {key: np.zeros((2, 2), np.int8) for key, value in index.items() if value == shard.name}
    save_file(fields, shard)
    assert load_file(shard)[name].dtype == np.int8
    with pytest.raises(SourceError, match="expected dtype BF16, F16 or F32, got I8"):
        open_source(sharded)


def _names(shard: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(shard, framework="np") as file:
        return list(file.keys())


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        open_source(tmp_path / "absent")
    with pytest.raises(SourceError, match=r"config\.json is missing"):
        open_source(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match="bare safetensors"):
        open_source(tmp_path / "a.safetensors")
