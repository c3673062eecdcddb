"""NF4 with double quantisation (Dettmers et al. 2023, QLoRA), as bitsandbytes stores it: the layers' matrices in blocks
of 64, embedding and head in 16 bits. Written as a dense rkf file, so that the same benchmark can score it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rkf.converters.source import Source
from rkf.file.writer import Writer
from rkf.format.constants import CHAT_TEMPLATE, TOKENIZER
from rkf.format.matrix import F32, Alias, DenseTensor, from_f32

_NEGATIVE = (-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105003)
_POSITIVE = (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)
LEVELS = np.array([*_NEGATIVE, 0.0, *_POSITIVE], np.float32)
BLOCK, SCALES = 64, 256
_BITS = 4 + 8 / BLOCK + 32 / (BLOCK * SCALES)


def rounded(weights: F32) -> F32:
    """The weights after NF4, decoded; their number is a multiple of 64."""
    blocks = weights.reshape(-1, BLOCK)
    scale = _rounded_scales(np.abs(blocks).max(axis=1))[:, None]
    middles = (LEVELS[1:] + LEVELS[:-1]) / 2
    levels = LEVELS[np.searchsorted(middles, blocks / np.maximum(scale, np.float32(1e-30)))]
    values: F32 = (levels * scale).reshape(weights.shape)
    return values


def _rounded_scales(scale: F32) -> F32:
    """Second quantisation: the scales minus their mean, in 8 bits; 256 of them share an f32. This code is linear where
    bitsandbytes has a dynamic one; both have errors below 1 % of a 4-bit step.
    """
    mean = scale.mean()
    padded = np.pad(scale - mean, (0, -len(scale) % SCALES)).reshape(-1, SCALES)
    step = np.maximum(np.abs(padded).max(axis=1, keepdims=True) / 127, np.float32(1e-30))
    values: F32 = (np.round(padded / step) * step).reshape(-1)[: len(scale)] + mean
    return values


def write(source: Source, out: Path) -> int:
    """Write the dense file `out`; returns the bytes that the model would take in NF4."""
    size = len(source.tokenizer_json)
    with Writer(out, metadata={"model": source.model.to_metadata()}, provenance={}, force=True) as file:
        for name in sorted([*source.tensors, *source.aliases]):
            if name in source.aliases:
                file.add(name, Alias(source.aliases[name]))
                continue
            tensor = source.read(name)
            if name.startswith("model.layers.") and tensor.data.ndim == 2:
                size += round(tensor.data.size * _BITS / 8)
                tensor = DenseTensor("bf16", from_f32(rounded(tensor.decode()), "bf16"))
            else:
                size += tensor.data.nbytes
            file.add(name, tensor)
        blobs = {**source.verbatim, TOKENIZER: source.tokenizer_json}
        if source.chat_template is not None:
            blobs[CHAT_TEMPLATE] = source.chat_template.encode()
        for name in sorted(blobs):
            file.blob(name, blobs[name])
    return size
