"""A source whose program reads its matrices through Hadamard transforms, with the weights to match. Knows no recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rkf.converters.input_scales import InputScales
from rkf.converters.source import ChangedSource, Source
from rkf.format.matrix import F32, DenseTensor, from_f32, to_f32
from rkf.model.metadata import ModelMetadata
from rkf.model.rotation import rotated, rotations
from rkf.numbers.hadamard_blocks import transformed

_TOGETHER = 1 << 22  # weights that are changed at a time, in f32


class RotatedSource(ChangedSource):
    """The same model as `source`, in the form that is clustered with less error (`rkf.model.rotation`).

    squares: the mean squares of the inputs of matrices, [cols] by name. With them, inputs are scaled too
    (`rkf.converters.input_scales`).
    """

    def __init__(self, source: Source, squares: Mapping[str, NDArray[np.floating]] | None = None) -> None:
        super().__init__(source)
        self.model: ModelMetadata = replace(source.model, program=rotated(source.model.program, source.aliases))
        blocks = rotations(self.model.program)
        self._blocks = {source.aliases.get(name, name): block for name, block in blocks.items()}
        self._scales = InputScales.of(self.model.program, source.aliases, squares or {})

    @property
    def label(self) -> str:
        return self._source.label

    @property
    def files(self) -> Mapping[str, str]:
        return self._source.files

    def refuse_changed(self) -> None:
        self._source.refuse_changed()

    @property
    def fingerprint(self) -> str:
        return self._source.fingerprint

    def read(self, name: str) -> DenseTensor:
        """A tensor of the source; what scales or rotation change is rounded to the source's dtype."""
        tensor = self._source.read(name)
        if name not in self._blocks and not self._scales.touches(name):
            return tensor
        data = np.empty(tensor.shape, tensor.data.dtype)
        step = max(1, _TOGETHER * len(data) // data.size)
        for start in range(0, len(data), step):
            part = slice(start, start + step)
            scaled = self._scales.applied(name, to_f32(tensor.data[part], tensor.dtype), part)
            data[part] = from_f32(self._rotated(name, scaled), tensor.dtype)
        return DenseTensor(tensor.dtype, data)

    def _rotated(self, name: str, values: F32) -> F32:
        return transformed(values, self._blocks[name]) if name in self._blocks else values
