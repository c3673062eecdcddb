"""A folder written by `export_transformers`, also after `save_pretrained`, as an .rkf file of the same ranks_id."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from rkf.bridges.transformers_folder import METHOD, Layer, LayerPart
from rkf.converters.description import Description, describe
from rkf.converters.families.blocks import EMBEDDING, HEAD
from rkf.converters.families.layout import Origin
from rkf.converters.input_files import read_bytes, read_json
from rkf.converters.shards import shards, tensors_of
from rkf.errors import CorruptError, SourceError, naming
from rkf.file.atomic import refuse_same_file
from rkf.file.writer import Writer
from rkf.format import canonical
from rkf.format.bitpack import unpack
from rkf.format.constants import CHAT_TEMPLATE, MAX_BLOB_BYTES, TOKENIZER, VERBATIM, index_bits, position_bytes
from rkf.format.matrix import Affine, Alias, ClusteredMatrix, DenseTensor, Exceptions, from_f32
from rkf.format.values_layout import Clusters
from rkf.model.metadata import ModelMetadata
from rkf.model.rotation import rotations
from rkf.numbers.hadamard_blocks import transformed
from rkf.torch.weight import ClusteredWeight


def restore(folder: str | Path, out: str | Path, *, force: bool = False) -> None:
    """Write an .rkf file of the model in such a folder: the same ranks and values, so the same ranks_id.

    Raises SourceError for a folder that `export_transformers` or `save_pretrained` did not write, UsageError if `out`
    exists and `force` is not given.
    """
    folder, out = Path(folder), Path(out)
    config = read_json(folder / "config.json", most=MAX_BLOB_BYTES)
    found = config.pop("quantization_config", None)
    label = folder.resolve().name
    if not is_exported(folder):
        raise SourceError(f"{label}: config.json has no quantization_config of rkf")
    if not (folder / TOKENIZER).is_file():  # a model's save_pretrained writes none
        raise SourceError(f"{label}: {TOKENIZER} is missing: write it there too, with the tokenizer's save_pretrained")
    try:
        container = canonical.decode(base64.b64decode(found["container"], validate=True))
        metadata, provenance = container["metadata"], container["provenance"]
        layers = {name: Layer.from_json(item, name) for name, item in found["layers"].items()}
        stacks = {name: Layer.from_json(item, name) for name, item in found["stacks"].items()}
        tied, model_map = dict(found["tied"]), dict(metadata["model"])
    except (KeyError, TypeError, ValueError, AttributeError, CorruptError) as error:
        raise SourceError(f"{label}: quantization_config of config.json is not as rkf wrote it: {error!r}") from error
    with naming(Path(label)):
        model = ModelMetadata.from_metadata(model_map)
    read_too = [folder / name for name in ("config.json", *VERBATIM, TOKENIZER, CHAT_TEMPLATE)]
    refuse_same_file(out, *shards(folder), *read_too)
    description = describe(config, label)
    read = _Reader(folder, description)
    blocks = rotations(model.program)
    matrices = {
        part.tensor: (f"{name}.clustered.parts.{number}.weight", part)
        for name, layer in layers.items()
        for number, part in enumerate(layer.parts)
    } | {
        part.tensor: (f"{name}.parts.{number}", part)
        for name, stack in stacks.items()
        for number, part in enumerate(stack.parts)
    }
    aliases = {HEAD: EMBEDDING} if tied or description.keys.tie_word_embeddings else {}
    blobs = {
        name: read_bytes(folder / name) for name in (*VERBATIM, TOKENIZER, CHAT_TEMPLATE) if (folder / name).is_file()
    }
    blobs["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    with Writer(out, metadata=metadata, provenance=provenance, force=force) as writer:
        for name in sorted((name for name, _, _ in model.program.weights()), key=str.encode):
            if name in aliases:
                writer.add(name, Alias(aliases[name]))
            elif name in matrices and matrices[name][1].clusters is not None:
                writer.add(name, read.matrix(*matrices[name]))
            elif name in matrices:
                writer.add(name, read.dense((matrices[name][0],), Origin((matrices[name][0],)), blocks.get(name)))
            else:
                origin = description.layout(name)[0]
                writer.add(name, read.dense(origin.names, origin, blocks.get(name)))
        for name in sorted(blobs):
            if blobs[name]:
                writer.blob(name, blobs[name])


def is_exported(folder: Path) -> bool:
    """Whether config.json says that the folder holds a clustered model."""
    found = read_json(folder / "config.json", optional=True, most=MAX_BLOB_BYTES).get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == METHOD


class _Reader:
    """Tensors of a folder's safetensors files."""

    def __init__(self, folder: Path, description: Description) -> None:
        self._label = folder.resolve().name
        family, keys = description.family, description.keys
        self._where: dict[str, tuple[Path, str]] = {}
        for path in shards(folder):
            for name in tensors_of(path):
                # save_pretrained writes some decoders under the names that they have in a larger model.
                for own in (family.own_name(keys, name, wrapped) for wrapped in (False, True)):
                    if own is not None:
                        self._where.setdefault(own, (path, name))

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self._where:
            raise SourceError(f"{self._label}: tensor {name} is missing; is a shard absent?")
        path, stored = self._where[name]
        with safe_open(path, framework="pt") as file:
            found: torch.Tensor = file.get_tensor(stored)
            return found

    def matrix(self, name: str, part: LayerPart) -> ClusteredMatrix:
        """A clustered matrix of the file, from the tensors of a layer's part."""
        clusters = part.clusters
        if clusters is None:
            raise ValueError(f"{name} is dense")
        spec = clusters.values
        blank = ClusteredWeight.blank(clusters, part.most_exceptions).state_dict()
        found = {key: self._tensor(f"{name}.{key}") for key in blank}
        for key, tensor in found.items():
            expected = blank[key]
            if tensor.shape != expected.shape or tensor.is_floating_point() != expected.is_floating_point():
                raise SourceError(
                    f"{self._label}: tensor {name}.{key}: expected {expected.dtype} {list(expected.shape)}, "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
        values = {
            key: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
            for key, tensor in found.items()
        }
        planes = tuple(values[key] for key in found if key.startswith("plane"))
        affine = exceptions = None
        if spec.granularity is not None:
            a, b = (
                None if dtype is None else from_f32(values[key], dtype) for key, dtype in (("a", spec.a), ("b", spec.b))
            )
            affine = Affine(spec.granularity, spec.group, a, b)
        if spec.exceptions is not None:
            positions = values["positions"].astype(f"<u{position_bytes(clusters.rows * clusters.columns)}")
            exceptions = Exceptions(positions, from_f32(values["exceptions"], spec.exceptions), spec.exceptions)
        indices = unpack(planes, index_bits(clusters.k), clusters.columns)
        counts = _counts(indices, clusters)
        return ClusteredMatrix(
            clusters.shape,
            planes,
            counts,
            values["centroids"],
            clusters.rows_per_table,
            part.source_dtype,
            affine,
            exceptions,
        )

    def dense(self, names: Sequence[str], origin: Origin, block: int | None) -> DenseTensor:
        """A dense tensor of the file, from the tensors of the checkpoint."""
        parts = []
        for name in names:
            tensor = self._tensor(name)
            values = origin.cut(tensor.float().numpy())
            for step in origin.steps:
                values = step.apply(values)
            parts.append(values)
        values = np.stack(parts) if origin.stacked else parts[0]
        if block is not None:
            values = transformed(values, block)
        dtype = {torch.bfloat16: "bf16", torch.float16: "f16"}.get(tensor.dtype, "f32")
        return DenseTensor(dtype, from_f32(np.ascontiguousarray(values), dtype))


def _counts(indices: NDArray[np.uint8], clusters: Clusters) -> NDArray[np.uint64]:
    """u64[tables, k]: how often each table's centroids are used."""
    table = np.arange(clusters.rows)[:, None] // clusters.rows_per_table
    found = np.bincount((table * clusters.k + indices).reshape(-1), minlength=clusters.tables * clusters.k)
    return found.astype(np.uint64).reshape(clusters.tables, clusters.k)
