"""An .rkf file back to foreign formats: a Hugging Face folder, or a GGUF in f16. One tensor in memory at a time.

What is written are the decoded weights, rounded to the source's dtype (Hugging Face) or to f16 (GGUF): exact for a
dense file in that dtype.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from itertools import chain
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np

from rkf.converters.architectures import GGUF_KEYS, HF_KEYS, llama3_divisors
from rkf.converters.names import EMBEDDING, GGUF_ROPE_FACTORS, HEAD, gguf_rows, permuted_heads, to_gguf
from rkf.converters.tokenizer_export import gguf_fields, token_text
from rkf.errors import UnsupportedError, UsageError, naming
from rkf.file.atomic import refuse_same_file, replacing, reporting
from rkf.file.container import Container, open_file
from rkf.format.constants import CHAT_TEMPLATE, DTYPE_BYTES, TOKENIZER
from rkf.format.matrix import F32, from_f32
from rkf.model.first_form import ModelConfig

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_SAFETENSORS = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
_TORCH = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
# llama.cpp has no architecture "mistral": a Mistral is a llama, and its window is not applied there.
_GGUF_ARCHITECTURE = {"mistral": "llama"}
_F16, _F32 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32


def export_hf(path: str | Path, folder: str | Path) -> None:
    """Write the model at `path` as a folder that transformers loads: safetensors, config.json, tokenizer, template.

    Raises UsageError if the folder exists and is not empty, and what opening `path` raises.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: exists already: choose another name for the folder")
    with open_file(path) as model, _staged(folder) as staging:
        config = _config(model)
        tensors = {name: entry.source_dtype for name, entry in model.tensors.items() if entry.kind != "alias"}
        _write_safetensors(staging / "model.safetensors", model, tensors)
        text = token_text(model.blob(TOKENIZER) or b"")
        _write_json(staging / "config.json", _hf_config(config, tensors))
        _write_json(staging / "generation_config.json", _hf_generation(config))
        _write_json(staging / "tokenizer_config.json", _hf_tokenizer_config(config, text))
        for name in (TOKENIZER, CHAT_TEMPLATE):
            if (blob := model.blob(name)) is not None:
                _write(staging / name, blob)


def export_gguf(path: str | Path, out: str | Path, *, force: bool = False) -> None:
    """Write the model at `path` as a GGUF that llama.cpp loads: matrices in f16, vectors in f32.

    Raises UsageError if `out` exists and `force` is not given, UnsupportedError for a tokenizer that GGUF has no name
    for, and what opening `path` raises.
    """
    out = Path(out)
    refuse_same_file(out, path)
    with open_file(path) as model, replacing(out, force) as output:
        config = _config(model)
        architecture = _GGUF_ARCHITECTURE.get(config.architecture, config.architecture)
        for part in chain([_gguf_head(model, config, architecture)], _gguf_tensors(model, config, architecture)):
            output.write(part)
            output.write(bytes(-output.position % gguf.GGUF_DEFAULT_ALIGNMENT))


def _config(model: Container) -> ModelConfig:
    if model.config is None:
        raise UnsupportedError(f"{model.path}: no model configuration in its metadata: nothing to export it as")
    return model.config


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A new folder, of no other process, that takes the place of `folder` at the end; an error leaves nothing of it."""
    with ExitStack() as stack:
        with reporting(folder):
            own = stack.enter_context(TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent))
            staging = Path(own, folder.name)  # what mkdtemp makes is readable by its owner alone
            staging.mkdir()
        yield staging
        with reporting(folder):
            staging.replace(folder)


def _write_safetensors(path: Path, model: Container, dtypes: Mapping[str, str]) -> None:
    """Stream tensors into a safetensors file (the library's writer wants all of them in memory).

    Layout: u64 length of the header, JSON header padded with spaces to 8 bytes, tensors without gaps.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype in dtypes.items():
        shape = model.tensors[name].shape
        begin, end = end, end + prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype in dtypes.items():
            file.write(from_f32(model.decode(name), dtype))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    _write(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as file:
        file.write(data)


def _hf_config(config: ModelConfig, tensors: Mapping[str, str]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    scaling = config.rope_scaling
    if scaling is not None:
        rope |= {"rope_type": scaling.type, "factor": scaling.factor}
        if scaling.type == "llama3":
            rope["low_freq_factor"] = scaling.low_freq_factor
            rope["high_freq_factor"] = scaling.high_freq_factor
            rope["original_max_position_embeddings"] = scaling.original_context
    # rope_parameters is what transformers reads since version 5, rope_theta and rope_scaling what it read before.
    old_scaling = None if scaling is None else {key: value for key, value in rope.items() if key != "rope_theta"}
    window = {} if config.sliding_window is None else {"use_sliding_window": True, "max_window_layers": 0}
    return {
        "architectures": [_CLASSES[config.architecture]],
        "model_type": config.architecture,
        **{theirs: getattr(config, ours) for ours, theirs in HF_KEYS.items()},
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in tensors,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
        "hidden_act": "silu",
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in tensors,
        "rope_parameters": rope,
        "rope_scaling": old_scaling,
        "rope_theta": config.rope_theta,
        "sliding_window": config.sliding_window,
        **(window if config.architecture.startswith("qwen") else {}),
        "tie_word_embeddings": HEAD not in tensors,
        "torch_dtype": _TORCH[tensors[EMBEDDING]],
    }


def _hf_generation(config: ModelConfig) -> dict[str, Any]:
    sampling: dict[str, Any] = {**config.generation, "do_sample": True} if config.generation else {}
    if "top_k" in sampling:
        sampling["top_k"] = int(sampling["top_k"])  # transformers takes no other
    return {"bos_token_id": config.bos_id, "eos_token_id": list(config.eos_ids), **sampling}


def _hf_tokenizer_config(config: ModelConfig, text: Mapping[int, str]) -> dict[str, Any]:
    settings = {
        "add_bos_token": config.add_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.context_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if config.bos_id is not None:
        settings["bos_token"] = text[config.bos_id]
    if config.eos_ids:
        settings["eos_token"] = text[config.eos_ids[0]]
    return settings


def _gguf_config(config: ModelConfig, architecture: str) -> dict[str, int | float | str]:
    """GGUF keys without the tokenizer's. 1: "mostly f16" of llama.cpp's file types."""
    own: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in GGUF_KEYS.items()}
    own |= {
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
        "attention.sliding_window": config.sliding_window,
    }
    if config.rope_scaling is not None and config.rope_scaling.type == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_scaling.factor}
    keys = {f"{architecture}.{key}": value for key, value in own.items() if value is not None}
    return {**keys, "general.file_type": 1}


def _gguf_type(value: float | str) -> gguf.GGUFValueType:
    if isinstance(value, str):
        return gguf.GGUFValueType.STRING
    return gguf.GGUFValueType.FLOAT32 if isinstance(value, float) else gguf.GGUFValueType.UINT32


def _gguf_head(model: Container, config: ModelConfig, architecture: str) -> bytes:
    """A GGUF up to its tensors. The library writes it to a file of its own, which it could not lock, nor report on."""
    with TemporaryDirectory() as folder, naming(model.path):
        path = Path(folder, "head.gguf")
        with closing(gguf.GGUFWriter(path, architecture)) as writer:
            for key, value in _gguf_config(config, architecture).items():
                writer.add_key_value(key, value, _gguf_type(value))
            gguf_fields(writer, model.blob(TOKENIZER) or b"", config)
            template = model.blob(CHAT_TEMPLATE)
            if template is not None:
                writer.add_chat_template(template.decode())
            for name, kind in _gguf_kinds(model).items():
                shape, width = model.tensors[name].shape, 2 if kind == _F16 else 4
                writer.add_tensor_info(to_gguf(name), shape, np.dtype(np.float32), prod(shape) * width, raw_dtype=kind)
            for name, factors in _gguf_extra(config).items():
                writer.add_tensor_info(name, factors.shape, factors.dtype, factors.nbytes)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        return path.read_bytes()


def _gguf_tensors(model: Container, config: ModelConfig, architecture: str) -> Iterator[np.ndarray]:
    """The data of every tensor, in the order of the head's."""
    for name, kind in _gguf_kinds(model).items():
        weights = model.decode(name)
        heads = permuted_heads(architecture, name)
        if heads is not None:
            weights = weights[gguf_rows(weights.shape[0], getattr(config, heads))]
        with naming(model.path):
            yield _f16(weights, name) if kind == _F16 else np.ascontiguousarray(weights)
    yield from _gguf_extra(config).values()


def _gguf_kinds(model: Container) -> dict[str, gguf.GGMLQuantizationType]:
    stored = {name: entry for name, entry in model.tensors.items() if entry.kind != "alias"}
    return {name: _F16 if len(entry.shape) > 1 else _F32 for name, entry in stored.items()}


def _gguf_extra(config: ModelConfig) -> dict[str, F32]:
    """Tensors that only a GGUF has."""
    if config.rope_scaling is None or config.rope_scaling.type != "llama3":
        return {}
    return {GGUF_ROPE_FACTORS: llama3_divisors(config.rope_scaling, config).astype(np.float32)}


def _f16(weights: np.ndarray, name: str) -> np.ndarray:
    rounded = from_f32(weights, "f16")
    if not np.isfinite(rounded).all():
        raise UnsupportedError(f"{name}: weights up to {np.abs(weights).max():g} don't fit f16: no GGUF can be written")
    return rounded
