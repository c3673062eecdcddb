"""Models of random weights in the shapes of known ones, to measure speed by size:
`python -m benchmarks.random_model 1.2B OUT.rkf [--k 16]` and `… 1.2B OUT.gguf`.

Nothing is clustered: ranks are drawn at random, with the default recipe's K and share of exceptions. The GGUF matches
llama.cpp's Q4_0 of such a model: blocks of Q4_0, a tied embedding as Q6_K (Q8_0 if its rows are not a multiple of 256).
Rows repeat every 32, so files are written as fast as the disk allows; this does not change the memory traffic.
"""

from __future__ import annotations

import argparse
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from numpy.typing import NDArray

from rkf.cluster.recipe import Recipe, Rule
from rkf.converters.description import Description, describe
from rkf.converters.families.gguf_config import fields_of
from rkf.converters.families.layout import assemblies
from rkf.file.writer import Writer
from rkf.format import bitpack
from rkf.format.constants import index_bits
from rkf.format.matrix import Affine, Alias, ClusteredMatrix, DenseTensor, Exceptions, Tensor
from rkf.model.metadata import ModelMetadata
from rkf.model.op import EMBEDDING, MATRIX, STACK

BLOCK_ROWS = 32
CONTEXT = 4096
LONG_CONTEXT = 40960
RANDOM = np.random.Generator(np.random.SFC64(0))


def _shape(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> Description:
    """A Llama."""
    return _described("llama", vocab, hidden, inner, layers, heads, kv_heads, head_dim)


def _described(
    family: str, vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int, **rest: Any
) -> Description:
    config = {
        "model_type": family,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        **rest,
    }
    return describe(config, "random model")


SHAPES = {
    "15M": _shape(32000, 288, 768, 6, 6, 6, 48),  # stories15M
    "0.4B": _shape(49152, 960, 2560, 32, 15, 5, 64),  # SmolLM2-360M
    "1.2B": _shape(128256, 2048, 8192, 16, 32, 8, 64),  # Llama 3.2 1B
    "3B": _shape(128256, 3072, 8192, 28, 24, 8, 128),  # Llama 3.2 3B
    # A mixture of 1.1 B weights of which a token reads 0.2 B, and a dense model of just those.
    "1B-A0.2B": _described(
        *("qwen3_moe", 32000, 1024, 2048, 20, 16, 4, 64),
        **{"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 256, "norm_topk_prob": True},
    ),
    "0.2B": _described("qwen3", 32000, 1024, 2048, 20, 16, 4, 64),
    # Windows in most layers, for context.py. Of gpt-oss-20b's 32 experts it has only the 4 that a token reads.
    "gemma3-4B": _described(
        *("gemma3_text", 262144, 2560, 10240, 34, 8, 4, 256),
        **{"sliding_window": 1024, "query_pre_attn_scalar": 256, "max_position_embeddings": LONG_CONTEXT},
    ),
    "gpt-oss-20B-A3.6B": _described(
        *("gpt_oss", 201088, 2880, 2880, 24, 64, 8, 64),
        **{"num_local_experts": 4, "num_experts_per_tok": 4, "max_position_embeddings": LONG_CONTEXT},
    ),
}


def write_rkf(description: Description, path: Path, k: int) -> None:
    """A clustered model in the form that `rkf convert` writes."""
    program = description.program
    head, embedding = program.logits.weight, program.stem[0].tensor_names()[0]
    recipe = Recipe.load("default", program, k, embedding)
    context: int = description.config["max_position_embeddings"]
    model = ModelMetadata(program=program, context_length=context, bos_id=1, eos_ids=(2,))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    with Writer(path, metadata={"model": model.to_metadata()}, provenance={"source": "random"}, force=True) as writer:
        for name, shape, _ in sorted(program.weights()):
            writer.add(name, Alias(embedding) if name == head else _tensor(shape, recipe.rule(name, shape)))
        writer.blob("tokenizer.json", tokenizer.to_str().encode())


def _tensor(shape: tuple[int, ...], rule: Rule) -> Tensor:
    if rule.k is None:
        return DenseTensor("f32", _dense(shape))
    rows, columns = prod(shape[:-1]), shape[-1]
    experts = prod(shape[:-2])
    ranks = RANDOM.integers(0, rule.k, (BLOCK_ROWS, columns), np.uint8)
    repeats = rows // BLOCK_ROWS
    exact = np.unique(RANDOM.integers(0, rows * columns, int(rows * columns * rule.exceptions)))
    position = np.uint32 if rows * columns < 1 << 32 else np.uint64
    scale = np.float16(columns**-0.5 / 64)  # keeps the scale of the residual stream
    counts = np.bincount(ranks.ravel(), minlength=rule.k).astype(np.uint64) * np.uint64(repeats // experts)
    one = experts == 1
    return ClusteredMatrix(
        shape=shape,
        planes=tuple(np.tile(plane, (repeats, 1)) for plane in bitpack.pack(ranks, index_bits(rule.k))),
        counts=np.tile(counts, (experts, 1)),
        centroids=np.tile(np.rint(np.linspace(-127, 127, rule.k, dtype=np.float32)), (experts, 1)),
        rows_per_table=rows // experts,
        source_dtype="bf16",
        affine=Affine("tensor" if one else "row", a=np.full(1 if one else rows, scale)),
        exceptions=Exceptions(exact.astype(position), np.full(len(exact), 0x3E00, np.uint16), "bf16"),
    )


def _dense(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Ones for a vector; noise for a router, so that tokens go to different experts."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return RANDOM.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)


def write_gguf(description: Description, path: Path) -> None:
    """The same shape for llama.cpp, in the form of its quantiser's Q4_0."""
    architecture, program = description.family.gguf.architecture, description.program
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields_of(description.family, description.keys).own.items():
        writer.add_key_value(f"{architecture}.{key}", value, _gguf_type(value))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(program.vocab_size)])
    writer.add_token_scores([0.0] * program.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * program.vocab_size)
    roles = {weight.name: weight.role for weight in program.weights()}
    shapes = {weight.name: weight.shape for weight in program.weights() if weight.name != program.logits.weight}
    for tensor in assemblies(description.gguf_layout, shapes):
        role = roles[tensor.parts[0].tensor]
        if role in (EMBEDDING, MATRIX, STACK):
            kind = _head_type(tensor.shape[1]) if role == EMBEDDING else gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor(tensor.name, _blocks(tensor.shape, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, _dense(tensor.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_type(value: float) -> gguf.GGUFValueType:
    if isinstance(value, bool):
        return gguf.GGUFValueType.BOOL
    return gguf.GGUFValueType.FLOAT32 if isinstance(value, float) else gguf.GGUFValueType.UINT32


def _head_type(columns: int) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType.Q8_0 if columns % 256 else gguf.GGMLQuantizationType.Q6_K


def _blocks(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> NDArray[np.uint8]:
    """Random blocks with one small scale: the last two bytes of a Q6_K block, the first two of any other."""
    rows, columns = prod(shape[:-1]), shape[-1]
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = RANDOM.integers(0, 256, (BLOCK_ROWS, columns // weights, size), np.uint8)
    at = slice(size - 2, size) if kind == gguf.GGMLQuantizationType.Q6_K else slice(0, 2)
    blocks[..., at] = np.array([columns**-0.5 / 512], np.float16).view(np.uint8)
    return np.tile(blocks.reshape(BLOCK_ROWS, -1), (rows // BLOCK_ROWS, 1)).reshape(*shape[:-1], -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path, help="a name that ends in .rkf or .gguf")
    parser.add_argument("--k", type=int, default=16)
    options = parser.parse_args()
    description = SHAPES[options.shape]
    if options.out.suffix == ".gguf":
        write_gguf(description, options.out)
    else:
        write_rkf(description, options.out, options.k)


if __name__ == "__main__":
    main()
