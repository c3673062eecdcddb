"""The model of a directory: `metadata.model`, checked against the tensors and blobs of the file."""

from __future__ import annotations

from rkf.format.constants import FEATURE_PROGRAM, KIND_MODEL, TOKENIZER
from rkf.format.directory import Directory
from rkf.format.fields import refuse
from rkf.format.superblock import Superblock
from rkf.model.metadata import ModelMetadata


def read_model(directory: Directory, superblock: Superblock) -> ModelMetadata | None:
    """The model of a file, or None if its metadata has none.

    Raises UnsupportedError for an op, an architecture or another word that this version does not know, StructureError
    for invalid metadata, for a tensor that is missing, surplus or of another shape, and for a missing tokenizer.
    """
    if superblock.kind != KIND_MODEL:
        return None
    carries = bool(superblock.required & FEATURE_PROGRAM)
    if "model" not in directory.metadata:
        if carries:
            refuse("metadata", "a model, as the superblock's feature bit says", "none")
        return None
    metadata = directory.metadata["model"]
    if carries:
        model = ModelMetadata.from_metadata(metadata)
    else:
        model = ModelMetadata.of_first_form(metadata, directory.tensors)
    _check_tensors(directory, model)
    if TOKENIZER not in directory.blobs:
        refuse(f"blob {TOKENIZER!r}", "a model's tokenizer", "no such section")
    return model


def _check_tensors(directory: Directory, model: ModelMetadata) -> None:
    known = set()
    for name, shape, _ in model.program.weights():
        entry = directory.tensors.get(name)
        if entry is None or entry.shape != shape:
            got = "no such tensor" if entry is None else f"{list(entry.shape)}"
            refuse(f"tensor {name!r}", f"shape {list(shape)}, as metadata.model implies", got)
        known.add(name)
    for name in directory.tensors:
        if name not in known:
            refuse(f"tensor {name!r}", "only tensors that metadata.model implies", "one that no op of it reads")
