"""Export: transformers loads the result, and converting it back gives the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE, Unigram

from rkf.converters import export
from rkf.converters.export import export_gguf, export_hf
from rkf.converters.families.gguf_rope import llama3_divisors
from rkf.converters.gguf_header import read_header
from rkf.converters.pipeline import convert
from rkf.converters.source import open_source
from rkf.converters.tokenizer_export import gguf_fields
from rkf.errors import OutputError, StructureError, UnsupportedError, UsageError
from rkf.file.atomic import replacing
from rkf.file.container import open_file
from rkf.file.edit import edit
from rkf.format.matrix import from_f32, to_f32
from rkf.model.metadata import ModelMetadata
from rkf.model.ops import Embed, Logits
from rkf.model.program import Program
from tests.format.test_atomic import Faults

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_hf_round_trip_of_a_dense_file(hf_folder: Callable[..., Path], tmp_path: Path, family: str, dtype: str) -> None:
    folder, out, back = hf_folder(family, dtype), tmp_path / "m.rkf", tmp_path / "back"
    convert(folder, out, recipe="dense")
    export_hf(out, back)
    before, after = open_source(folder), open_source(back)
    assert after.model == before.model
    assert after.verbatim == before.verbatim
    assert after.aliases == before.aliases
    assert after.chat_template == before.chat_template
    assert after.tokenizer_json == before.tokenizer_json
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(each, dtype="auto", attn_implementation="eager")
        for each in (folder, back)
    ]
    assert models[0].dtype == models[1].dtype == getattr(torch, dtype)
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        np.testing.assert_array_equal(*(model(tokens).logits.float().numpy() for model in models))


def test_hf_of_a_clustered_file_has_the_decoded_weights(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    out, back = tmp_path / "m.rkf", tmp_path / "back"
    convert(hf_folder("qwen3", "float32"), out)
    export_hf(out, back)
    state = transformers.AutoModelForCausalLM.from_pretrained(back).state_dict()
    with open_file(out) as model:
        for name in state:
            np.testing.assert_array_equal(state[name].numpy(), model.decode(name))


def test_hf_tokenizer_encodes_the_same(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, back = hf_folder("llama"), tmp_path / "back"
    convert(folder, tmp_path / "m.rkf")
    export_hf(tmp_path / "m.rkf", back)
    text = "Hello <|im_start|>user 123 漢字  😀\n"
    first, second = (transformers.AutoTokenizer.from_pretrained(each) for each in (folder, back))
    assert first(text)["input_ids"] == second(text)["input_ids"]
    assert (second.bos_token, second.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert second.chat_template == "{{ messages }}"


def test_transformers_samples_as_the_source_recommends(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, back = hf_folder("qwen3"), tmp_path / "back"
    recommended = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps({**recommended, "eos_token_id": 2}))
    convert(folder, tmp_path / "m.rkf", recipe="dense")
    export_hf(tmp_path / "m.rkf", back)
    model = transformers.AutoModelForCausalLM.from_pretrained(back)
    assert {key: getattr(model.generation_config, key) for key in recommended} == recommended
    assert model.generate(torch.arange(3, 9)[None], max_new_tokens=4).shape[1] > 6


def test_a_unigram_tokenizer(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, back = hf_folder("llama"), tmp_path / "back"
    pieces = [(piece, 0.0) for piece in ("<unk>", "<s>", "</s>")] + [(letter, -1.0) for letter in "abc"]
    (folder / "tokenizer.json").write_text(Tokenizer(Unigram(pieces, unk_id=0)).to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    convert(folder, tmp_path / "m.rkf", recipe="dense")
    export_hf(tmp_path / "m.rkf", back)
    tokenizer = transformers.AutoTokenizer.from_pretrained(back)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer("cab", add_special_tokens=False)["input_ids"] == [5, 3, 4]
    with pytest.raises(UnsupportedError, match=r"m\.rkf: tokenizer\.json: kind 'Unigram'"):
        export_gguf(tmp_path / "m.rkf", tmp_path / "m.gguf")


BEYOND = {
    "id": 10**9,
    "content": "x",
    **dict.fromkeys(("special", "lstrip", "rstrip", "single_word", "normalized"), True),
}


def forged(path: Path, blobs: dict[str, bytes], generation: dict[str, float]) -> Path:
    """A sound file with other blobs and recommended options."""
    with open_file(path) as file:
        metadata = json.loads(json.dumps(file.metadata))
    metadata["model"]["generation"] = generation
    edit(path, metadata=metadata, blobs=blobs)
    return path


@pytest.mark.parametrize(
    ("tokenizer", "problem"),
    [(b"{", "tokenizer.json: EOF"), ({"added_tokens": [BEYOND]}, "token 'x' has id 1000000000, not 90")],
)
def test_a_tokenizer_that_cannot_be_exported(
    hf_folder: Callable[..., Path], tmp_path: Path, tokenizer: Any, problem: str
) -> None:
    folder = hf_folder("llama")
    convert(folder, tmp_path / "m.rkf", recipe="dense")
    if isinstance(tokenizer, dict):
        tokenizer = json.dumps(json.loads((folder / "tokenizer.json").read_text()) | tokenizer).encode()
    path = forged(tmp_path / "m.rkf", {"tokenizer.json": tokenizer}, {})
    for run in (export_hf, export_gguf):
        with pytest.raises(StructureError, match=problem):
            run(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recommended_options_replace_no_ends(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = hf_folder("llama")
    for name in ("generation_config.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    convert(folder, tmp_path / "m.rkf", recipe="dense")
    path = forged(tmp_path / "m.rkf", {}, {"bos_token_id": 7.0, "eos_token_id": 383.0, "top_k": 1e308})
    export_hf(path, tmp_path / "hf")
    said = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert said == {"bos_token_id": 1, "eos_token_id": [2, 0], "top_k": 384, "do_sample": True}
    export_gguf(forged(path, {}, {"repetition_penalty": 1.5, "temperature": 0.0}), tmp_path / "m.gguf")
    again = open_source(tmp_path / "m.gguf")
    assert again.model.generation == {"repetition_penalty": 1.5, "temperature": 0.0}
    convert(tmp_path / "m.gguf", tmp_path / "again.rkf", recipe="dense")
    export_hf(tmp_path / "again.rkf", tmp_path / "greedy")
    said = json.loads((tmp_path / "greedy" / "generation_config.json").read_text())
    assert said == {"bos_token_id": 1, "eos_token_id": [2, 0], "repetition_penalty": 1.5}


def test_ids_that_no_token_has(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Rows past the tokenizer's tokens, as many embeddings have, one of which config.json calls an end."""
    folder = hf_folder("llama", vocab_size=400, bos_token_id=398, eos_token_id=399)
    for name in ("generation_config.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    convert(folder, tmp_path / "m.rkf", recipe="dense")
    export_hf(tmp_path / "m.rkf", tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert settings.keys().isdisjoint(("bos_token", "eos_token"))
    assert open_source(tmp_path / "hf").model == open_source(folder).model


def test_a_gguf_ends_as_its_source_and_says_what_it_cannot_keep(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = hf_folder("llama")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 8, 2, 7]}))
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"] = {"type": "NFC"}
    tokenizer["added_tokens"][0]["rstrip"] = True
    path.write_text(json.dumps(tokenizer))
    convert(folder, tmp_path / "m.rkf", recipe="dense")
    notes = export_gguf(tmp_path / "m.rkf", tmp_path / "m.gguf")
    assert [note.split(",")[0] for note in notes] == [
        "tokenizer.json changes texts by NFC",
        "a GGUF has no lstrip",
        f"a GGUF cannot name these tokens as ends of an answer: {Tokenizer.from_file(str(path)).id_to_token(7)!r}",
    ]
    model = open_source(tmp_path / "m.gguf").model
    assert set(model.eos_ids) == {0, 2, 8, 9}
    assert model.special_tokens["eos_token"].id == 2


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_spaces_that_a_gguf_puts_elsewhere_are_said(scheme: str, tmp_path: Path) -> None:
    vocab = {text: index for index, text in enumerate(["<unk>", "a", "\u2581", *(f"<0x{n:02X}>" for n in range(256))])}
    tokenizer = Tokenizer(BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    stem, top = Embed(dst="x", table="e", rows=300, cols=1), Logits(dst="l", src="x", weight="h", rows=300)
    model = ModelMetadata(Program((stem,), (), (), (top,)), 1)
    notes = gguf_fields(gguf.GGUFWriter(tmp_path / "t.gguf", "llama"), tokenizer.to_str().encode(), model)
    assert [f"Metaspace ({scheme})" in note for note in notes] == [True] * (scheme != "never")


@pytest.mark.parametrize("type_name", export.GGUF_TYPES)
def test_gguf_types(hf_folder: Callable[..., Path], tmp_path: Path, type_name: str) -> None:
    """Matrices are what the gguf package makes of the decoded weights, and the file converts again."""
    convert(hf_folder("llama"), tmp_path / "m.rkf", k=16)
    export_gguf(tmp_path / "m.rkf", tmp_path / "m.gguf", type_name=type_name)
    tensors = {each.name: each for each in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    kind = export.GGUF_TYPES[type_name][0]
    with open_file(tmp_path / "m.rkf") as file:
        for name, stored in (("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")):
            weights, found = file.decode(f"model.layers.0.{stored}.weight"), tensors[f"blk.0.{name}.weight"]
            expected = kind if weights.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else gguf.GGMLQuantizationType.F16
            assert found.tensor_type == expected
            np.testing.assert_array_equal(
                gguf.quants.dequantize(found.data, found.tensor_type),
                gguf.quants.dequantize(gguf.quants.quantize(weights, expected), expected),
            )
    assert tensors["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    convert(tmp_path / "m.gguf", tmp_path / "again.rkf", k=16)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_hf_dtypes(hf_folder: Callable[..., Path], tmp_path: Path, dtype: str) -> None:
    convert(hf_folder("llama"), tmp_path / "m.rkf", k=16)
    export_hf(tmp_path / "m.rkf", tmp_path / "back", dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert {str(each.dtype) for each in model.parameters()} == {f"torch.{export.TORCH_NAMES[dtype]}"}
    with open_file(tmp_path / "m.rkf") as file:
        weights = file.decode("model.layers.0.mlp.up_proj.weight")
    found = model.get_parameter("model.layers.0.mlp.up_proj.weight").float().detach().numpy()
    np.testing.assert_array_equal(found, to_f32(from_f32(weights, dtype), dtype))


def test_weights_beyond_f16(tmp_path: Path, hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama", "float32")
    with safe_open(folder / "model.safetensors", framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors")
    convert(folder, tmp_path / "m.rkf", recipe="dense")
    problem = r"m\.rkf: model\.layers\.0\.mlp\.up_proj\.weight: weights up to 1e\+06 do not fit f16"
    with pytest.raises(UnsupportedError, match=problem):
        export_gguf(tmp_path / "m.rkf", tmp_path / "m.gguf", type_name="q8_0")
    with pytest.raises(UnsupportedError, match=problem):
        export_hf(tmp_path / "m.rkf", tmp_path / "back", dtype="f16")
    export_gguf(tmp_path / "m.rkf", tmp_path / "m.gguf", type_name="bf16")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_a_full_disk(
    hf_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    convert(hf_folder("llama"), tmp_path / "m.rkf", recipe="dense")
    run, out, before = getattr(export, f"export_{form}"), tmp_path / f"out.{form}", set(tmp_path.iterdir())
    faults = Faults(monkeypatch, ("write",))
    run(tmp_path / "m.rkf", tmp_path / "whole")
    calls, before = faults.count, {*before, tmp_path / "whole"}
    assert calls > 20
    for faults.fail_at in range(1, calls + 1):
        faults.count = 0
        with pytest.raises(OutputError, match=rf"out\.{form}\S*: cannot be written: No space left on device"):
            run(tmp_path / "m.rkf", out)
        assert set(tmp_path.iterdir()) == before


def test_two_exports_at_once(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    convert(hf_folder("llama"), tmp_path / "m.rkf", recipe="dense")
    with replacing(tmp_path / "m.gguf") as file:
        file.write(b"mine")
        with pytest.raises(OutputError, match="another process is writing it"):
            export_gguf(tmp_path / "m.rkf", tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == b"mine"
    with pytest.raises(OutputError, match="another process is writing it"), export.staged_folder(tmp_path / "back"):
        export_hf(tmp_path / "m.rkf", tmp_path / "back")
    export_hf(tmp_path / "m.rkf", tmp_path / "back")
    assert open_source(tmp_path / "back").model.layers == 2
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_round_trip(gguf_file: Callable[..., Path], tmp_path: Path, family: str) -> None:
    path, out, back = gguf_file(family), tmp_path / "m.rkf", tmp_path / "back.gguf"
    convert(path, out, recipe="dense")
    export_gguf(out, back)
    before, after = open_source(path), open_source(back)
    assert after.model == before.model
    assert after.tokenizer_json == before.tokenizer_json
    assert after.chat_template == before.chat_template
    assert list(after.tensors) == list(before.tensors)
    for name in before.tensors:
        weights = before.read(name).decode()
        expected = weights.astype(np.float16).astype(np.float32) if weights.ndim > 1 else weights
        np.testing.assert_array_equal(after.read(name).decode(), expected)


def test_gguf_as_transformers_loads_it(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = hf_folder("llama", "float16")
    convert(folder, tmp_path / "m.rkf", recipe="dense")
    export_gguf(tmp_path / "m.rkf", tmp_path / "m.gguf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    source = open_source(folder)
    for name, tensor in loaded.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), source.read(name).decode())


@pytest.mark.parametrize("rope", [LLAMA3, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}])
def test_rope_scaling_survives_both_ways(hf_folder: Callable[..., Path], tmp_path: Path, rope: dict) -> None:
    folder, out = (
        hf_folder("llama", rope_parameters=rope, head_dim=64, num_attention_heads=1, num_key_value_heads=1),
        tmp_path / "m.rkf",
    )
    convert(folder, out)
    export_hf(out, tmp_path / "back")
    export_gguf(out, tmp_path / "back.gguf")
    expected = open_source(folder).model
    assert open_source(tmp_path / "back").model == expected
    back = open_source(tmp_path / "back.gguf").model.program.ropes[0]
    np.testing.assert_allclose(back.frequencies, expected.program.ropes[0].frequencies, rtol=1e-5)
    if rope["rope_type"] == "llama3":
        stored = read_header(tmp_path / "back.gguf").tensors["rope_freqs.weight"].stored(tmp_path / "back.gguf")
        np.testing.assert_array_equal(stored.view(np.float32)[0], llama3_divisors(rope, 64).astype(np.float32))
    # Older versions of transformers read rope_theta and rope_scaling: a config that is made has both spellings.
    convert(tmp_path / "back.gguf", tmp_path / "again.rkf", recipe="dense")
    export_hf(tmp_path / "again.rkf", tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["rope_theta"] == rope["rope_theta"]
    assert config["rope_scaling"]["factor"] == rope["factor"]
    again = open_source(tmp_path / "again").model.program.ropes[0]
    np.testing.assert_allclose(again.frequencies, expected.program.ropes[0].frequencies, rtol=1e-5)


def test_refusals(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = hf_folder("llama"), tmp_path / "m.rkf"
    convert(folder, out)
    with pytest.raises(UsageError, match="exists already"):
        export_hf(out, folder)
    (tmp_path / "m.gguf").write_bytes(b"old")
    with pytest.raises(UsageError, match="--force"):
        export_gguf(out, tmp_path / "m.gguf")
    export_gguf(out, tmp_path / "m.gguf", force=True)
    assert open_source(tmp_path / "m.gguf").model.layers == 2


def test_a_tokenizer_without_a_gguf_name(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = hf_folder("llama")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    convert(folder, tmp_path / "m.rkf")
    before = set(tmp_path.iterdir())
    with pytest.raises(UnsupportedError, match=r"m\.rkf: tokenizer\.json: no pre-tokenizer of llama\.cpp"):
        export_gguf(tmp_path / "m.rkf", tmp_path / "m.gguf")
    assert set(tmp_path.iterdir()) == before


def test_weights_past_f16(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = hf_folder("llama", "float32")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors")
    convert(folder, tmp_path / "m.rkf", recipe="dense")
    with pytest.raises(UnsupportedError, match=r"m\.rkf: lm_head.weight: weights up to 1e\+06"):
        export_gguf(tmp_path / "m.rkf", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("rope", "field"),
    [
        ({"rope_type": "default", "rope_theta": 1e39}, "llama.rope.freq_base"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 1e300}, "llama.rope.scaling.factor"),
    ],
)
def test_numbers_that_a_gguf_cannot_hold(
    hf_folder: Callable[..., Path], tmp_path: Path, rope: dict, field: str
) -> None:
    convert(hf_folder("llama", rope_parameters=rope), tmp_path / "m.rkf")
    with pytest.raises(UnsupportedError, match=rf"{field}: 1e\+\d+ is no float32"):
        export_gguf(tmp_path / "m.rkf", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
