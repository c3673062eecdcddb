"""A fair source for comparisons, made from a quantised GGUF: `python -m benchmarks.degrid SRC.gguf OUT`.

Weights from a block format lie on its grid. The same format then finds that grid again and looks better than it is. So
this adds uniform noise of one grid cell to every block-quantised weight: a draw from the possible originals. OUT is a
folder in Hugging Face's layout, bf16; the seed and numpy determine its bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from blake3 import blake3
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import Q4_K
from numpy.typing import NDArray

from rkf.converters.export import export_hf
from rkf.converters.gguf import GgufSource
from rkf.converters.gguf_header import GgufTensor
from rkf.converters.source import spec_of
from rkf.errors import SourceError
from rkf.file.writer import Writer
from rkf.format.constants import CHAT_TEMPLATE, TOKENIZER
from rkf.format.matrix import Alias, DenseTensor, from_f32

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


def _first(blocks: U8) -> F32:
    """The f16 that blocks begin with, f32[blocks, 1]."""
    return np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)


def _of_super_blocks(blocks: U8) -> F32:
    """Q4_K and Q5_K: the f16 times the 6-bit scale of each 32 weights."""
    scales, _ = Q4_K.get_scale_min(blocks[:, 4:16])
    return _first(blocks) * scales.astype(np.float32)


def _of_q6(blocks: U8) -> F32:
    """Q6_K: the f16 at the end times the signed scale of each 16 weights."""
    scales = np.ascontiguousarray(blocks[:, -18:-2]).view(np.int8)
    return _first(blocks[:, -2:]) * scales.astype(np.float32)


# The step of each sub-block, f32[blocks, sub-blocks], with either sign, from the bytes of blocks.
_STEPS: dict[Type, Callable[[U8], F32]] = {
    **dict.fromkeys((Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0), _first),
    **dict.fromkeys((Type.Q4_K, Type.Q5_K), _of_super_blocks),
    Type.Q6_K: _of_q6,
}
_EXACT = {Type.F32, Type.F16, Type.BF16}


class Degridded(GgufSource):
    """A GGUF file whose block-quantised weights are moved off their grid."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        for name, tensor in self._tensors.items():
            if tensor.type not in _STEPS.keys() | _EXACT:
                known = ", ".join(each.name for each in _STEPS)
                raise SourceError(
                    f"{path}: {tensor.name}: no step is known of {Type(tensor.type).name}, only of {known}"
                )
            if tensor.type in _STEPS:
                self._stored[name] = replace(self._stored[name], dtype="bf16")
        self.tensors = {name: spec_of(origin, self._stored) for name, origin in self._origins.items()}

    def _rows(self, tensor: GgufTensor, start: int, stop: int, shape: tuple[int, ...]) -> DenseTensor:
        values = super()._rows(tensor, start, stop, shape)
        if tensor.type not in _STEPS:
            return values
        weights, block_bytes = GGML_QUANT_SIZES[tensor.type]
        blocks = tensor.stored(self.path, start, stop).reshape(-1, block_bytes)
        steps = np.abs(_STEPS[Type(tensor.type)](blocks))
        step = np.repeat(steps, weights // steps.shape[1], axis=1)
        before = start * tensor.row_bytes // block_bytes
        noise = _random(tensor.name).random((before + len(blocks), weights), np.float32)[before:] - np.float32(0.5)
        return DenseTensor("bf16", from_f32(values.data + (noise * step).reshape(shape), "bf16"))


def _random(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=int.from_bytes(blake3(name.encode()).digest(8), "little")))


def degrid(src: Path, out: Path) -> None:
    """Write the folder `out`. Raises the errors of reading the source and of writing the folder."""
    source = Degridded(src)
    with TemporaryDirectory(dir=out.parent) as folder:
        dense = Path(folder) / "dense.rkf"
        metadata, provenance = {"model": source.model.to_metadata()}, {"source": source.label}
        with Writer(dense, metadata=metadata, provenance=provenance) as file:
            for name in sorted([*source.tensors, *source.aliases]):
                file.add(name, Alias(source.aliases[name]) if name in source.aliases else source.read(name))
            blobs = {**source.verbatim, TOKENIZER: source.tokenizer_json}
            if source.chat_template is not None:
                blobs[CHAT_TEMPLATE] = source.chat_template.encode()
            for name in sorted(blobs):
                file.blob(name, blobs[name])
        export_hf(dense, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("src", type=Path, help="the GGUF file")
    parser.add_argument("out", type=Path, help="the folder to create")
    degrid(**vars(parser.parse_args()))
