"""Files of hand-written programs, for tests: dense f32, or clustered by a rule."""

import numpy as np
import tokenizers

from rkf.cluster.clustering import cluster
from rkf.file.writer import Writer
from rkf.format.matrix import DenseTensor
from rkf.model.metadata import ModelMetadata
from rkf.model.op import MATRIX, STACK


def word_tokenizer(vocab_size):
    """The words t0, t1, …, one a token."""
    words = {f"t{number}": number for number in range(vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


def write_program(path, program, weights, rule=None, context_length=64):
    """weights: f32 by full name. rule: name, shape -> how matrices and stacks are clustered. Returns path."""
    model = ModelMetadata(program=program, context_length=context_length)
    roles = {weight.name: weight.role for weight in program.weights()}
    with Writer(path, metadata={"model": model.to_metadata()}, provenance={}) as writer:
        for name in sorted(roles):
            tensor = DenseTensor("f32", np.ascontiguousarray(weights[name], np.float32))
            if rule is not None and roles[name] in (MATRIX, STACK):
                tensor, _ = cluster(tensor, rule(name, tensor.shape), name)
            writer.add(name, tensor)
        writer.blob("tokenizer.json", word_tokenizer(program.vocab_size).to_str().encode())
    return path
