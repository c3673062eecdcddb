"""Foreign tensor names -> canonical (Hugging Face) names, and which rows a GGUF permutes. Tables, and their readers.

The GGUF names are those of gguf-py's `TENSOR_NAMES` (gguf/constants.py).
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

GGUF_GLOBAL = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": "model.norm.weight",
    "output.weight": HEAD,
}

GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# Not weights: the rope frequencies of Llama 3.1, which become ModelConfig.rope_scaling.
GGUF_ROPE_FACTORS = "rope_freqs.weight"

# Not weights: frequencies that old Hugging Face checkpoints stored although the configuration determines them.
HF_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

# GGUF tensors whose rows interleave the two halves of each head, for an architecture whose rope in ggml rotates
# neighbours (LLAMA_ROPE_TYPE_NORM): canonical layer part -> which head count applies. Source: `LlamaModel.permute` in
# llama.cpp's convert_hf_to_gguf.py, applied there to q_proj and k_proj, weight and bias alike. Qwen's rope
# (LLAMA_ROPE_TYPE_NEOX) rotates halves as Hugging Face does: its rows are stored as they are.
GGUF_PERMUTED = {"llama": {"self_attn.q_proj": "heads", "self_attn.k_proj": "kv_heads"}}

_GGUF_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_CANONICAL_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_GGUF_LAYER_INVERSE = {part: name for name, part in GGUF_LAYER.items()}
_GGUF_GLOBAL_INVERSE = {canonical: name for name, canonical in GGUF_GLOBAL.items()}


def from_gguf(name: str) -> str | None:
    """The canonical name of a GGUF tensor, or None when the tables don't know it."""
    if name in GGUF_GLOBAL:
        return GGUF_GLOBAL[name]
    match = _GGUF_BLOCK.fullmatch(name)
    if match is None or match[2] not in GGUF_LAYER:
        return None
    return f"model.layers.{int(match[1])}.{GGUF_LAYER[match[2]]}.{match[3]}"


def to_gguf(name: str) -> str:
    """The GGUF name of a canonical tensor."""
    if name in _GGUF_GLOBAL_INVERSE:
        return _GGUF_GLOBAL_INVERSE[name]
    match = _CANONICAL_LAYER.fullmatch(name)
    if match is None or match[2] not in _GGUF_LAYER_INVERSE:
        raise KeyError(name)
    return f"blk.{match[1]}.{_GGUF_LAYER_INVERSE[match[2]]}.{match[3]}"


def permuted_heads(gguf_architecture: str, name: str) -> str | None:
    """The ModelConfig field that counts the heads of a permuted tensor, or None when its rows lie as they should."""
    match = _CANONICAL_LAYER.fullmatch(name)
    return GGUF_PERMUTED.get(gguf_architecture, {}).get(match[2]) if match else None


def rope_rows(rows: int, heads: int) -> NDArray[np.intp]:
    """Where the rows of Hugging Face's order lie in a permuted tensor: `hf = gguf[rope_rows(rows, heads)]`.

    Hugging Face rotates row i of a head with row i + dim/2, ggml's NORM rope row 2i with row 2i + 1.
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def gguf_rows(rows: int, heads: int) -> NDArray[np.intp]:
    """The inverse of `rope_rows`: `gguf = hf[gguf_rows(rows, heads)]`."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)
