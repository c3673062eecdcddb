"""Sound inputs that the fuzz targets damage: the golden files, and one tiny model in every form."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from rkf.calibrate import kept
from rkf.calibrate.calibration import Calibration
from rkf.converters.export import export_gguf
from rkf.converters.pipeline import convert
from rkf.converters.source import open_source
from rkf.eval import reference
from rkf.eval.distributions import DRAWS, TOP, Sampled
from rkf.eval.reference import Window
from rkf.file.container import Container, open_file
from rkf.model.metadata import ModelMetadata
from rkf.runtime.cpu import CpuBackend
from rkf.runtime.engine import Engine, Request
from rkf.runtime.session import Session
from tests.runtime import tiny
from tests.spec.document import VECTORS

VOCAB, WIDTH = 400, 32
CONFIG = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": "float16"},
    **{"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-05},
    **{"bos_token_id": 1, "eos_token_id": 2, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    "tie_word_embeddings": False,
}
SETTINGS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": tiny.CHAT_TEMPLATE}
_TOKEN = {"content": "<|im_end|>", "special": True, "lstrip": False, "normalized": False, "single_word": False}
ADDED = {"<|a|>": VOCAB - 2, "<|b|>": VOCAB - 1}
ALL_SETTINGS = SETTINGS | {
    **{"added_tokens_decoder": {"2": _TOKEN, str(VOCAB - 1): {"content": "<|b|>"}}, "eos_token": _TOKEN},
    **{"additional_special_tokens": ["<|a|>", _TOKEN], "extra_special_tokens": {"image_token": "<|b|>"}},
    **{"chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}], "model_max_length": 64},
}
GENERATION = {"bos_token_id": 1, "eos_token_id": [2], "temperature": 0.7, "top_k": 40, "top_p": 0.9}
_MODELS: tuple[dict[str, Any], ...] = (
    {
        **{"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "fuse_unk": True},
        **{"end_of_word_suffix": None, "byte_fallback": True, "ignore_merges": False, "merges": [["a", "b"]]},
        "vocab": {"<unk>": 0, "<|s|>": 1, "a": 2, "b": 3, "ab": 4, "\u2581": 5, "<0xC3>": 6, "Ġ": 7, "1": 8},
    },
    {
        **{"type": "Unigram", "unk_id": 0, "byte_fallback": True},
        "vocab": [["<unk>", 0.0], ["<|s|>", 0.0], ["a", -1.0], ["\u2581a", -2.0], ["b", -3.0], ["<0xC3>", -4.0]],
    },
    {
        **{"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##"},
        **{"max_input_chars_per_word": 100, "vocab": {"<unk>": 0, "<|s|>": 1, "a": 2, "##b": 3}},
    },
    {"type": "WordLevel", "unk_token": "<unk>", "vocab": {"<unk>": 0, "<|s|>": 1, "a": 2, "b": 3}},
)
_SPLIT = {"type": "Split", "pattern": {"Regex": "\\s+|[^\\s]+"}, "behavior": "Isolated", "invert": False}
_PARTS: dict[str, tuple[dict[str, Any], ...]] = {
    "normalizers": (
        *({"type": "NFC"}, {"type": "Prepend", "prepend": "\u2581"}, {"type": "Lowercase"}),
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        {"type": "Strip", "strip_left": True, "strip_right": False},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
        | {"strip_accents": None, "lowercase": True},
    ),
    "pretokenizers": (
        *(_SPLIT, {"type": "Digits", "individual_digits": True}, {"type": "FixedLength", "length": 5}),
        {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Punctuation", "behavior": "Contiguous"},
    ),
    "decoders": (
        *({"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}),
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        *({"type": "WordPiece", "prefix": "##", "cleanup": True}, {"type": "BPEDecoder", "suffix": "</w>"}),
        {"type": "CTC", "pad_token": "a", "word_delimiter_token": "|", "cleanup": True},
    ),
}
RECIPE = """k = 16
[defaults]
exceptions = 0.01
affine = "row"
[rotated]
grid = true
[[rule]]
roles = ["head"]
layers = "ends"
k_factor = 2
[[rule]]
tensors = ["model.layers.{last}.*"]
k = 32
group = 32
affine = "group"
[[rule]]
tensors = ["*"]
dense = true
"""

_folder = TemporaryDirectory(prefix="rkf-seeds-")
FOLDER = Path(_folder.name)


@cache
def session(name: str) -> tuple[Container, CpuBackend, bytes]:
    """A golden model, ready to run, and a session of it."""
    container = open_file(VECTORS / name)
    backend, path = CpuBackend(container, threads=1), FOLDER / f"{name}.session"
    engine = Engine(backend)
    request = Request([1, 2, 3, 1, 2], lambda logits, ids: int(logits.argmax()), most=9)
    engine.submit(request)
    while not request.ended:
        engine.step()
        request.take()
    Session(path, container, backend, engine).save()
    return container, backend, path.read_bytes()


@cache
def vectors() -> tuple[bytes, ...]:
    """The golden files of the specification."""
    return tuple(path.read_bytes() for path in sorted(VECTORS.glob("*.rk[fv]")))


@cache
def tokenizer() -> dict[str, Any]:
    return json.loads(tiny.byte_level_tokenizer(VOCAB).to_str())


def small_tokenizer(draw: Callable[[int], int]) -> dict[str, Any]:
    """A tokenizer.json with each kind of model, and up to three parts of every kind."""

    def chosen(kind: str) -> dict[str, Any]:
        return {"type": "Sequence", kind: [_PARTS[kind][draw(len(_PARTS[kind]))] for _ in range(draw(4))]}

    special = {"id": 1, "content": "<|s|>", "special": True, "normalized": False}
    own = {"id": 9, "content": "b a", "special": False, "normalized": True}
    sides = {"single_word": False, "lstrip": False, "rstrip": False}
    return {
        **{"version": "1.0", "truncation": None, "padding": None, "added_tokens": [special | sides, own | sides]},
        **{"normalizer": chosen("normalizers"), "pre_tokenizer": chosen("pretokenizers"), "post_processor": None},
        **{"decoder": chosen("decoders"), "model": _MODELS[draw(len(_MODELS))]},
    }


def _weights() -> dict[str, Any]:
    layer = {
        **{"self_attn.q_proj": (32, WIDTH), "self_attn.k_proj": (16, WIDTH), "self_attn.v_proj": (16, WIDTH)},
        **{"self_attn.o_proj": (WIDTH, 32), "mlp.gate_proj": (64, WIDTH), "mlp.up_proj": (64, WIDTH)},
        **{"mlp.down_proj": (WIDTH, 64), "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)},
    }
    shapes = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "lm_head.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    shapes |= {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(np.float16) for name, shape in sorted(shapes.items())}


@cache
def checkpoint() -> dict[str, bytes]:
    """The files of a folder in Hugging Face's layout, by name."""
    path = FOLDER / "model.safetensors"
    save_file(_weights(), path, metadata={"format": "pt"})
    told = {
        "config.json": CONFIG,
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": SETTINGS,
        "generation_config.json": GENERATION,
        "special_tokens_map.json": {"eos_token": {"content": "<|im_end|>", "special": True}},
    }
    return {path.name: path.read_bytes()} | {name: json.dumps(value).encode() for name, value in told.items()}


@cache
def sharded() -> dict[str, bytes]:
    """The weights in two files, and their index, by name."""
    tensors, files, places = _weights(), dict[str, bytes](), dict[str, str]()
    for number in range(2):
        name = f"model-{number + 1:05}-of-00002.safetensors"
        part = dict(list(tensors.items())[number::2])
        save_file(part, FOLDER / name)
        files[name] = (FOLDER / name).read_bytes()
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    return {**files, "model.safetensors.index.json": json.dumps(index).encode()}


def write_checkpoint(folder: Path) -> Path:
    """The folder, which may exist."""
    folder.mkdir(exist_ok=True)
    for name, content in checkpoint().items():
        (folder / name).write_bytes(content)
    return folder


@cache
def rkf_file() -> Path:
    """The model, dense."""
    path = FOLDER / "dense.rkf"
    convert(write_checkpoint(FOLDER / "hf"), path, recipe="dense")
    return path


@cache
def model() -> ModelMetadata:
    with open_file(rkf_file()) as container:
        assert container.model is not None
        return container.model


@cache
def gguf() -> bytes:
    path = FOLDER / "model.gguf"
    export_gguf(rkf_file(), path)
    return path.read_bytes()


@cache
def adapter() -> dict[str, bytes]:
    """The files of a PEFT LoRA adapter for the checkpoint, by name."""
    path, random = FOLDER / "adapter_model.safetensors", np.random.default_rng(0)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    halves = {"A": (4, WIDTH), "B": (32, 4)}
    save_file({name.format(half): random.random(shape, np.float32) for half, shape in halves.items()}, path)
    config = {"peft_type": "LORA", "bias": "none", "r": 4, "lora_alpha": 8, "alpha_pattern": {"q_proj": 16}}
    return {"adapter_config.json": json.dumps(config).encode(), path.name: path.read_bytes()}


@cache
def exported() -> dict[str, bytes]:
    """The files of a folder of `rkf export transformers`, by name."""
    from rkf.bridges.transformers_export import export_transformers

    path, folder = FOLDER / "clustered.rkf", FOLDER / "exported"
    convert(write_checkpoint(FOLDER / "hf"), path, k=8)
    export_transformers(path, folder)
    return {each.name: each.read_bytes() for each in folder.iterdir()}


@cache
def kept_calibration() -> bytes:
    path = FOLDER / "kept.tok"
    names = ["model.layers.0.mlp.up_proj.weight"]
    tokens = np.arange(32, dtype=np.uint32).reshape(2, 16)
    rkf_file()
    made = Calibration(open_source(FOLDER / "hf"), tokens, "self")
    kept.save(path, made.kept(dict.fromkeys(names, 0.5)))
    return path.read_bytes()


@cache
def kept_reference() -> bytes:
    path, random = FOLDER / "kept.kld", np.random.default_rng(0)
    ids = random.integers(0, VOCAB, (3, TOP + DRAWS)).astype(np.uint32)
    sample = Sampled(ids, random.random(ids.shape).astype(np.float32))
    reference.write(path, [Window(np.arange(8), sample, np.zeros(3, np.float32), 0.0)])
    return path.read_bytes()
