"""Small model files for tests: dense, or clustered by a rule."""

from dataclasses import replace

from rkf.cluster.clustering import cluster
from rkf.file.writer import Writer
from rkf.format.matrix import Alias, DenseTensor, from_f32
from rkf.model.metadata import ModelMetadata
from rkf.model.rotation import rotated
from tests.format.first_form_metadata import metadata_of
from tests.runtime import tiny

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TOKENIZER = tiny.byte_level_tokenizer().to_str().encode()


def write_model(path, config, weights, rule=None, dtype="f32", rotate=False):
    """Write f32 weights by canonical name (head tied if it is not there); vectors stay dense. rule: a Rule, or a
    function from a name to one; rotate: read the matrices' inputs through transforms. Returns path.
    """
    tensors = {name: DenseTensor(dtype, from_f32(values, dtype)) for name, values in weights.items()}
    if rule is not None:
        of = rule if callable(rule) else lambda name: rule
        tensors = {name: cluster(tensor, of(name), name)[0] for name, tensor in tensors.items()}
    tensors.setdefault(HEAD, Alias(EMBEDDING))
    metadata = metadata_of(config)
    if rotate:
        model = ModelMetadata.of_first_form(metadata, tensors)
        metadata = replace(model, program=rotated(model.program, {HEAD: EMBEDDING})).to_metadata()
    with Writer(path, metadata={"model": metadata}, provenance={}) as writer:
        for name in sorted(tensors):
            writer.add(name, tensors[name])
        writer.blob("tokenizer.json", TOKENIZER)
    return path
