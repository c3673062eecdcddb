"""A model's tensors, prepared for kernels: matrices with their kernels, vectors as f32. Each is prepared once.

Knows the tensors that a program names and their places in memory, not their use.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rkf.file.container import Container
from rkf.file.prefix import within
from rkf.format.matrix import DenseTensor
from rkf.model.op import EMBEDDING, MATRIX, ROUTER, STACK
from rkf.model.program import Program
from rkf.runtime.matrices import Memory, Prepared, clustered, dense
from rkf.runtime.structs import BLOCK

_MATRICES = (EMBEDDING, MATRIX, STACK, ROUTER)


class Weights:
    """The tensors of a container. level: the CPU level, None for exact arithmetic only; bits: as in CpuBackend."""

    def __init__(
        self, container: Container, program: Program, memory: Memory, *, level: str | None, bits: int | None
    ) -> None:
        self._container, self._memory = container, memory
        self._prepared: dict[str, Prepared] = {}
        self._with_bias: dict[tuple[str, str | None], NDArray] = {}
        self._vectors: dict[tuple[str, float], int] = {}
        found = (weight.name for weight in program.weights() if weight.role in _MATRICES)
        names = dict.fromkeys(map(container.stored_name, found))
        for name, tensor in container.load_many(names):
            if isinstance(tensor, DenseTensor):
                self._prepared[name] = dense(tensor, memory)
            else:
                kept = tensor if bits is None else within(tensor, bits)
                self._prepared[name] = clustered(kept, memory, level)

    @property
    def kernels(self) -> set[str]:
        """The names of the kernels that the matrices need."""
        each = (item.kernels for item in self._prepared.values())
        return {kernel for kernels in each for kernel in (kernels.one, kernels.many, kernels.row)}

    @property
    def most_columns(self) -> int:
        return max(int(item.struct["columns"][0]) for item in self._prepared.values())

    def link(self, addresses: Mapping[str, int]) -> None:
        """Write the kernels' addresses into the matrices."""
        for item in self._prepared.values():
            m = item.struct[0]
            m["multiply_one"], m["multiply_many"] = addresses[item.kernels.one], addresses[item.kernels.many]
            m["decode_row"] = addresses[item.kernels.row]

    def is_fast(self, name: str) -> bool:
        """Whether a matrix reads packed activations."""
        return self._prepared[self._container.stored_name(name)].kernels.one != "f32"

    def rows(self, name: str) -> int:
        """The rows of a matrix; of a stack, those of all its matrices."""
        return int(self._prepared[self._container.stored_name(name)].struct["rows"][0])

    def decoded(self, name: str) -> NDArray[np.float32]:
        """A dense tensor as f32."""
        return self._container.decode(name)

    def matrix(self, name: str, bias: str | None = None) -> int:
        """The address of a MATRIX with this bias. Call `link` first."""
        key = self._container.stored_name(name), bias
        if key not in self._with_bias:
            struct = self._prepared[key[0]].struct
            if bias is not None:
                struct = struct.copy()
                struct["bias"] = self.vector(bias)
            self._memory.hold(struct)
            self._with_bias[key] = struct
        return self._with_bias[key].ctypes.data

    def vector(self, name: str, offset: float = 0.0) -> int:
        """The address of a dense tensor plus `offset` as f32, flat, padded with zeros to whole blocks."""
        if (name, offset) not in self._vectors:
            values = self._container.decode(name).reshape(-1) + np.float32(offset)
            self._vectors[name, offset] = self._memory.hold(np.pad(values, (0, -len(values) % BLOCK)))
        return self._vectors[name, offset]
