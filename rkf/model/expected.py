"""The model of a directory: `metadata.model`, checked against the tensors and blobs of the file."""

from __future__ import annotations

from typing import NoReturn

from rkf.format.constants import FEATURE_PROGRAM, KIND_MODEL, TOKENIZER
from rkf.format.directory import Directory
from rkf.format.fields import refuse
from rkf.format.superblock import Superblock
from rkf.model.metadata import ModelMetadata
from rkf.model.program import Program, layer_of, layer_prefix


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
        if isinstance(metadata, dict) and "program" in metadata and "architecture" not in metadata:
            refuse("superblock, required features", "bit 2, as metadata.model has a program", "none")
        model = ModelMetadata.of_first_form(metadata, directory.tensors)
    _check_tensors(directory, model.program, carries)
    if TOKENIZER not in directory.blobs:
        refuse(f"blob {TOKENIZER!r}", "a model's tokenizer", "no such section")
    return model


def _check_tensors(directory: Directory, program: Program, carries: bool) -> None:
    """carries: whether the file has the program itself, so that its ops mean something to its writer."""
    known = set()
    for name, shape, _ in program.weights():
        entry = directory.tensors.get(name)
        if entry is None or entry.shape != shape:
            reason = program.naming(name) if carries else "metadata.model"
            expected = f"shape {list(shape)}, by {reason}"
            refuse(f"tensor {name!r}", expected, _found(name, None if entry is None else entry.shape))
        known.add(name)
    for name in directory.tensors:
        if name not in known:
            _refuse_surplus(name, program)


def _found(name: str, shape: tuple[int, ...] | None) -> str:
    if shape is not None:
        return f"{list(shape)}"
    layer = layer_of(name)
    prefix = "" if layer is None else layer_prefix(layer)
    doubled = layer is not None and name.startswith(2 * prefix)
    return "no such tensor" + (f" ({prefix} stands twice: names in layers are relative)" if doubled else "")


def _refuse_surplus(name: str, program: Program) -> NoReturn:
    layer = layer_of(name)
    if layer is not None and layer >= program.layers:
        refuse(f"tensor {name!r}", f"tensors of {program.layers} layers, as many as order has", f"one of layer {layer}")
    refuse(f"tensor {name!r}", "only tensors that ops of metadata.model name", "one that no op reads")
