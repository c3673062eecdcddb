"""Models of random weights in the shapes of known ones, to measure speed by size:
`python -m benchmarks.random_model 1.2B OUT.rkf [--k 16]` and `… 1.2B OUT.gguf`.

Nothing is clustered: ranks are drawn at random, with the default recipe's K and share of exceptions. The GGUF matches
llama.cpp's Q4_0 of such a model: blocks of Q4_0, a tied embedding as Q6_K (Q8_0 if its rows are not a multiple of 256).
Rows repeat every 32, so files are written as fast as the disk allows; this does not change the memory traffic.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
import tokenizers
from numpy.typing import NDArray

from rkf.cluster.recipe import Recipe, Rule
from rkf.converters.architectures import GGUF_KEYS
from rkf.converters.names import to_gguf
from rkf.file.writer import Writer
from rkf.format import bitpack
from rkf.format.constants import index_bits
from rkf.format.matrix import Affine, Alias, ClusteredMatrix, DenseTensor, Exceptions, Tensor
from rkf.model.first_form import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BLOCK_ROWS = 32
RANDOM = np.random.Generator(np.random.SFC64(0))


def _shape(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=4096,
        norm_epsilon=1e-5,
        rope_theta=10000.0,
        bos_id=1,
        eos_ids=(2,),
    )


SHAPES = {
    "15M": _shape(32000, 288, 768, 6, 6, 6, 48),  # stories15M
    "0.4B": _shape(49152, 960, 2560, 32, 15, 5, 64),  # SmolLM2-360M
    "1.2B": _shape(128256, 2048, 8192, 16, 32, 8, 64),  # Llama 3.2 1B
    "3B": _shape(128256, 3072, 8192, 28, 24, 8, 128),  # Llama 3.2 3B
}


def _weights(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama, by name; the head is the embedding."""
    return {name: shape for name, shape, always in sorted(config.tensors()) if always and name != HEAD}


def write_rkf(config: ModelConfig, path: Path, k: int) -> None:
    """A clustered model in the form that `rkf convert` writes."""
    recipe = Recipe.load("default", k, config.layers)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    tensors: dict[str, tuple[int, ...] | None] = {**_weights(config), HEAD: None}
    with Writer(path, metadata={"model": config.to_metadata()}, provenance={"source": "random"}, force=True) as writer:
        for name, shape in sorted(tensors.items()):
            writer.add(name, Alias(EMBEDDING) if shape is None else _tensor(shape, recipe.rule(name, shape)))
        writer.blob("tokenizer.json", tokenizer.to_str().encode())


def _tensor(shape: tuple[int, ...], rule: Rule) -> Tensor:
    if rule.k is None:
        return DenseTensor("f32", np.ones(shape, np.float32))
    rows, columns = shape
    ranks = RANDOM.integers(0, rule.k, (BLOCK_ROWS, columns), np.uint8)
    repeats = rows // BLOCK_ROWS
    exact = np.unique(RANDOM.integers(0, rows * columns, int(rows * columns * rule.exceptions)))
    position = np.uint32 if rows * columns < 1 << 32 else np.uint64
    scale = np.full(1, columns**-0.5 / 64, np.float16)  # keeps the scale of the residual stream
    return ClusteredMatrix(
        shape=shape,
        planes=tuple(np.tile(plane, (repeats, 1)) for plane in bitpack.pack(ranks, index_bits(rule.k))),
        counts=np.bincount(ranks.ravel(), minlength=rule.k).astype(np.uint64)[None] * np.uint64(repeats),
        centroids=np.rint(np.linspace(-127, 127, rule.k, dtype=np.float32))[None],
        rows_per_table=rows,
        source_dtype="bf16",
        affine=Affine("tensor", a=scale),
        exceptions=Exceptions(exact.astype(position), np.full(len(exact), 0x3E00, np.uint16), "bf16"),
    )


def write_gguf(config: ModelConfig, path: Path) -> None:
    """The same shape for llama.cpp, in the form of its quantiser's Q4_0."""
    writer = gguf.GGUFWriter(path, "llama")
    for ours, theirs in GGUF_KEYS.items():
        writer.add_key_value(f"llama.{theirs}", getattr(config, ours), _gguf_type(getattr(config, ours)))
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    for name, shape in _weights(config).items():
        if len(shape) == 1:
            writer.add_tensor(to_gguf(name), np.ones(shape, np.float32))
        else:
            kind = _head_type(shape[1]) if name == EMBEDDING else gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor(to_gguf(name), _blocks(shape, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_type(value: float) -> gguf.GGUFValueType:
    return gguf.GGUFValueType.FLOAT32 if isinstance(value, float) else gguf.GGUFValueType.UINT32


def _head_type(columns: int) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType.Q8_0 if columns % 256 else gguf.GGMLQuantizationType.Q6_K


def _blocks(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> NDArray[np.uint8]:
    """Random blocks with one small scale: the last two bytes of a Q6_K block, the first two of any other."""
    rows, columns = shape
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = RANDOM.integers(0, 256, (BLOCK_ROWS, columns // weights, size), np.uint8)
    at = slice(size - 2, size) if kind == gguf.GGMLQuantizationType.Q6_K else slice(0, 2)
    blocks[..., at] = np.array([columns**-0.5 / 512], np.float16).view(np.uint8)
    return np.tile(blocks.reshape(BLOCK_ROWS, -1), (rows // BLOCK_ROWS, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path, help="a name that ends in .rkf or .gguf")
    parser.add_argument("--k", type=int, default=16)
    options = parser.parse_args()
    config = SHAPES[options.shape]
    if options.out.suffix == ".gguf":
        write_gguf(config, options.out)
    else:
        write_rkf(config, options.out, options.k)


if __name__ == "__main__":
    main()
