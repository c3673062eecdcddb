"""A tiny random model with a real tokenizer, for tests that need text and no knowledge."""

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rkf.file.writer import Writer
from rkf.format.matrix import Alias, DenseTensor
from rkf.model.first_form import ModelConfig
from tests.format.first_form_metadata import metadata_of

CORPUS = [
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # 3",
    "Größe, naïve café, 日本語のテキスト, emoji 😀👩‍👩‍👧 and numbers 1234567890.",
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_tokenizer(vocab_size=400):
    """A byte-level BPE, as SmolLM2, Llama 3 and Qwen have."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_tokenizer():
    """A BPE with byte fallback and the decoder of Llama 2 and Mistral: U+2581 for spaces, the first one stripped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyzTPS.,", "▁t", "he", "▁the"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def config(vocab_size=400, **changes):
    """Dimensions of a llama with grouped queries, small enough to run in milliseconds."""
    numbers = {
        "architecture": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "context_length": 256,
        "norm_epsilon": 1e-5,
        "rope_theta": 10000.0,
        "bos_id": 1,
        "eos_ids": (2,),
    }
    return ModelConfig(**{**numbers, **changes})


def weights(config, seed=0):
    """Random f32 weights by canonical name, embeddings tied; large enough that logits differ clearly."""
    random = np.random.Generator(np.random.Philox(key=seed))
    query, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    for layer in range(config.layers):
        name = f"model.layers.{layer}."
        shapes |= {
            name + "input_layernorm.weight": (config.hidden_size,),
            name + "post_attention_layernorm.weight": (config.hidden_size,),
            name + "self_attn.q_proj.weight": (query, config.hidden_size),
            name + "self_attn.k_proj.weight": (kv, config.hidden_size),
            name + "self_attn.v_proj.weight": (kv, config.hidden_size),
            name + "self_attn.o_proj.weight": (config.hidden_size, query),
            name + "mlp.gate_proj.weight": (config.intermediate_size, config.hidden_size),
            name + "mlp.up_proj.weight": (config.intermediate_size, config.hidden_size),
            name + "mlp.down_proj.weight": (config.hidden_size, config.intermediate_size),
        }
    return {
        name: (
            1 + 0.1 * random.standard_normal(shape) if len(shape) == 1 else 0.2 * random.standard_normal(shape)
        ).astype(np.float32)
        for name, shape in sorted(shapes.items())
    }


def write(path, config, weights, *, tokenizer=None, template=CHAT_TEMPLATE, tensors=None, provenance=None):
    """A model file of dense f32 tensors, embeddings tied. tensors: what takes the place of some, by name."""
    tokenizer = tokenizer or byte_level_tokenizer()
    stored = {name: DenseTensor("f32", data) for name, data in weights.items()}
    stored |= {"lm_head.weight": Alias("model.embed_tokens.weight"), **(tensors or {})}
    provenance = provenance or {"source": "random"}
    with Writer(path, metadata={"model": metadata_of(config)}, provenance=provenance) as writer:
        for name in sorted(stored):
            writer.add(name, stored[name])
        if template is not None:
            writer.blob("chat_template.jinja", template.encode())
        writer.blob("tokenizer.json", tokenizer.to_str().encode())
    return path
