"""A fair source for comparisons, made from a GGUF of 4 or 8 bits: `python -m benchmarks.degrid SRC.gguf OUT`.

Weights from a block format lie on its grid. The same format then finds that grid again and looks better than it is. So
this adds uniform noise of one grid cell to every block-quantised weight: a draw from the possible originals. OUT is a
folder in Hugging Face's layout, bf16; the seed and numpy determine its bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from blake3 import blake3
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

from rkf.converters.export import export_hf
from rkf.converters.gguf import GgufSource
from rkf.converters.gguf_header import GgufTensor
from rkf.file.writer import Writer
from rkf.format.constants import CHAT_TEMPLATE, TOKENIZER
from rkf.format.matrix import Alias, DenseTensor, from_f32

# Types whose blocks start with their step, an f16.
_STEP_FIRST = {Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0}


class Degridded(GgufSource):
    """A GGUF file whose block-quantised weights are moved off their grid."""

    def _values(self, tensor: GgufTensor, order: np.ndarray | None = None) -> DenseTensor:
        values = super()._values(tensor, order)
        if tensor.type not in _STEP_FIRST:
            return values
        stored = tensor.stored(self.path) if order is None else tensor.stored(self.path)[order]
        weights, block_bytes = GGML_QUANT_SIZES[tensor.type]
        blocks = stored.reshape(-1, block_bytes)
        step = np.abs(np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32))
        noise = _random(tensor.name).random((len(blocks), weights), np.float32) - np.float32(0.5)
        return DenseTensor("bf16", from_f32(values.data + (noise * step).reshape(tensor.shape), "bf16"))


def _random(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=int.from_bytes(blake3(name.encode()).digest(8), "little")))


def degrid(src: Path, out: Path) -> None:
    """Write the folder `out`. Raises the errors of reading the source and of writing the folder."""
    source = Degridded(src)
    with TemporaryDirectory(dir=out.parent) as folder:
        dense = Path(folder) / "dense.rkf"
        metadata, provenance = {"model": source.config.to_metadata()}, {"source": source.label}
        with Writer(dense, metadata=metadata, provenance=provenance) as file:
            for name in sorted([*source.tensors, *source.aliases]):
                file.add(name, Alias(source.aliases[name]) if name in source.aliases else source.read(name))
            if source.chat_template is not None:
                file.blob(CHAT_TEMPLATE, source.chat_template.encode())
            file.blob(TOKENIZER, source.tokenizer_json)
        export_hf(dense, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("src", type=Path, help="the GGUF file")
    parser.add_argument("out", type=Path, help="the folder to create")
    degrid(**vars(parser.parse_args()))
