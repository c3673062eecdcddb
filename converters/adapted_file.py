"""An adapter applied while an rkf file runs: the open file's program gets the adapter's products. Knows no family.

The file stays as it is. `rkf.converters.adapter` merges an adapter into the weights instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rkf.converters.adapter import Adapter
from rkf.converters.description import describe
from rkf.converters.families.layout import Layout, Origin, as_named
from rkf.converters.input_files import files_fingerprint
from rkf.errors import UnsupportedError, UsageError
from rkf.file.container import Container, Load
from rkf.format.matrix import DenseTensor
from rkf.model.adapted import LowRank, adapted, half_names, plain_matrices
from rkf.model.program import Program
from rkf.model.rotation import rotations
from rkf.numbers.hadamard_blocks import transformed

_INSTEAD = "merge it with `rkf convert --adapter`"


def adapt(container: Container, folder: str | PathLike[str]) -> None:
    """Let `container` give the model with a PEFT LoRA adapter from now on. folder: of peft's `save_pretrained`.

    Raises UsageError (no adapter, or a file without a model), UnsupportedError for what no op can express, by module
    and tensor; SourceError for an adapter of another model.
    """
    if container.model is None:
        raise UsageError(f"{container.path}: expected a model, got a file without one")
    adapter, program = Adapter(Path(folder)), container.model.program
    if _has_scaled_inputs(container):
        raise UnsupportedError(
            f"{container.path}: converted with --calibrate quick, which changed the inputs of its matrices: {_INSTEAD}"
        )
    shapes = {weight.name: weight.shape for weight in program.weights()}
    places = adapter.places(_layout(container), shapes, str(container.path))
    plain, blocks = plain_matrices(program), rotations(program)
    products: dict[str, LowRank] = {}
    made: dict[str, Callable[[Load], DenseTensor]] = {}
    for name, (module, origin) in places.items():
        found = _cut(origin, *adapter.halves(module)) if name in plain else None
        if found is None:
            raise UnsupportedError(f"{folder}: module {module}: {_why(program, name)}: {_INSTEAD}")
        a, b = found
        if name in blocks:  # A (H H x): the matrix reads H x, and H is its own inverse
            a = DenseTensor("f32", transformed(a.decode(), blocks[name]))
        products[name] = LowRank(len(a.data), adapter.scale(module))
        for half, tensor in zip(half_names(name), (a, b), strict=True):
            made[half] = _giving(tensor)
    adapter.refuse_changed()
    model = replace(container.model, program=adapted(program, products))
    container.run_as(model, made, files_fingerprint(adapter.files))


def _layout(container: Container) -> Layout:
    config = container.blob("config.json")
    return as_named if config is None else describe(json.loads(config), str(container.path)).layout


def _has_scaled_inputs(container: Container) -> bool:
    calibration = container.provenance.get("calibration")
    return isinstance(calibration, dict) and calibration.get("use") == "scales"


def _cut(origin: Origin, a: DenseTensor, b: DenseTensor) -> tuple[DenseTensor, DenseTensor] | None:
    """A and B of the program's matrix, from those of the module that holds it; None if it is no product of such halves.

    Where the origin moves whole rows and whole columns, so do the rows of B and the columns of A.
    """
    shape = len(b.data), a.data.shape[1]
    rows = _moved(origin, np.broadcast_to(np.arange(shape[0], dtype=np.int32)[:, None], shape))
    columns = _moved(origin, np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape))
    if not origin.keeps_values or rows.ndim != 2 or (rows != rows[:, :1]).any() or (columns != columns[:1]).any():
        return None
    return (
        DenseTensor(a.dtype, np.ascontiguousarray(a.data[:, columns[0]])),
        DenseTensor(b.dtype, np.ascontiguousarray(b.data[rows[:, 0]])),
    )


def _moved(origin: Origin, values: NDArray[np.int32]) -> NDArray[np.int32]:
    values = origin.cut(values)
    for step in origin.steps:
        values = step.apply(values)
    return values


def _why(program: Program, name: str) -> str:
    return f"{name} is read by {program.naming(name)}, which takes no adapter while it runs"


def _giving(tensor: DenseTensor) -> Callable[[Load], DenseTensor]:
    return lambda load: tensor
