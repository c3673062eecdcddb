"""A fair source for comparisons, made from a GGUF of 4 or 8 bits: `python -m benchmarks.degrid SRC.gguf OUT`.

Weights from a block format lie on its grid. The same format then finds that grid again and looks better than it is. So
this adds uniform noise of one grid cell to every block-quantised weight: a draw from the possible originals. OUT is a
folder in Hugging Face's layout, bf16; the seed and numpy determine its bytes.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from blake3 import blake3
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

from rkf.converters.export import export_hf
from rkf.converters.gguf import GgufSource
from rkf.converters.gguf_header import GgufTensor
from rkf.converters.source import spec_of
from rkf.file.writer import Writer
from rkf.format.constants import CHAT_TEMPLATE, TOKENIZER
from rkf.format.matrix import Alias, DenseTensor, from_f32

# Types whose blocks start with their step, an f16.
_STEP_FIRST = {Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0}


class Degridded(GgufSource):
    """A GGUF file whose block-quantised weights are moved off their grid."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        for name, tensor in self._tensors.items():
            if tensor.type in _STEP_FIRST:
                self._stored[name] = replace(self._stored[name], dtype="bf16")
        self.tensors = {name: spec_of(origin, self._stored) for name, origin in self._origins.items()}

    def _rows(self, tensor: GgufTensor, start: int, stop: int, shape: tuple[int, ...]) -> DenseTensor:
        values = super()._rows(tensor, start, stop, shape)
        if tensor.type not in _STEP_FIRST:
            return values
        weights, block_bytes = GGML_QUANT_SIZES[tensor.type]
        blocks = tensor.stored(self.path, start, stop).reshape(-1, block_bytes)
        step = np.abs(np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32))
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
