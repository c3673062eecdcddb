"""Tiny random checkpoints of every family, in both formats, made on the fly."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.converters.hub_server import Hub, hub

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12345 o'clock, no?\n\n\tdef f(x):\n        return x ** 2\n",
    "Straße, naïve café, 漢字かな交じり文, 한국어, नमस्ते, 😀👩‍👩‍👧 ½ ²   spaces      run\r\n" * 2,
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB = 384

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-5},
    "mistral": {"sliding_window": 32, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
}


def train_tokenizer() -> Tokenizer:
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(CORPUS, trainer)
    return built


def random_model(family: str, **overrides: Any) -> Any:
    """A transformers model whose every tensor (norms and biases too) is random."""
    torch.manual_seed(0)
    config = CONFIGS[family](**{**SIZES, **EXTRA[family], **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1))
    return model.eval()


def write_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(train_tokenizer().to_str())
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield running


@pytest.fixture
def hf_folder(tmp_path: Path) -> Callable[..., Path]:
    """hf_folder(family, dtype=…, shard=…, **config overrides) -> a folder written by transformers."""

    def make(family: str = "llama", dtype: str = "bfloat16", shard: str = "5GB", **overrides: Any) -> Path:
        folder = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        model = random_model(family, **overrides).to(getattr(torch, dtype))
        model.save_pretrained(folder, max_shard_size=shard)
        write_tokenizer(folder)
        return folder

    return make


def gguf_permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """The same as llama.cpp's LlamaModel.permute."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def gguf_tokenizer(writer: gguf.GGUFWriter, pre: str = "smollm") -> None:
    trained = json.loads(train_tokenizer().to_str())
    vocab = trained["model"]["vocab"]
    texts = sorted(vocab, key=vocab.__getitem__)
    texts += [f"[PAD{index}]" for index in range(len(texts), VOCAB)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_merges([" ".join(merge) for merge in trained["model"]["merges"]])
    writer.add_token_types([gguf.TokenType.CONTROL if text in SPECIALS else gguf.TokenType.NORMAL for text in texts])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
}


def gguf_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


@pytest.fixture
def gguf_file(tmp_path: Path) -> Callable[..., Path]:
    """gguf_file(family, model=…, kinds={canonical name: type}, edit=…) -> a GGUF in llama.cpp's form."""

    def make(
        family: str = "llama",
        model: Any = None,
        kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
        edit: Callable[[gguf.GGUFWriter], None] | None = None,
        endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
        pre: str = "smollm",
        **overrides: Any,
    ) -> Path:
        model = model if model is not None else random_model(family, **overrides)
        config = model.config
        path = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}.gguf"
        arch = "llama" if family in ("llama", "mistral") else family
        writer = gguf.GGUFWriter(path, arch, endianess=endianess)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(head_dim)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_vocab_size(config.vocab_size)
        gguf_tokenizer(writer, pre)
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            values = tensor.float().numpy()
            if arch == "llama" and ("q_proj" in name or "k_proj" in name):
                values = gguf_permute(
                    values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                )
            kind = (kinds or {}).get(name, gguf.GGMLQuantizationType.F32)
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
        if edit is not None:
            edit(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make
