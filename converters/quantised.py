"""Checkpoints with quantised weights: which are read, and the pairs of codes and scales in them. Knows no family.

MXFP4 and FP8 have a number format of their own, so they are read as weights. Others are refused by name: they are made
for one kernel, and their original is the better source.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rkf.converters.fp8 import CODES, fp8_weight
from rkf.converters.mxfp4 import BLOCKS, SCALES, mxfp4_weight
from rkf.converters.shards import StoredTensor
from rkf.converters.source import TensorSpec
from rkf.errors import SourceError
from rkf.format.matrix import DenseTensor

# Keys of config.json that describe how a checkpoint is quantised.
KEYS = ("quantization_config", "compression_config")
_DENSE = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
# What follows a weight's name in that of its scales: block scales, and those of compressed-tensors.
_SCALES = ("_scale_inv", "_scale")
# Scales of activations and of cached keys and values, which only a kernel in FP8 reads.
_OF_ACTIVATIONS = re.compile(r"(?:.*\.)?(?:input|output|activation|[qkv])_scale(?:_ub)?")


class StoredWeight(Protocol):
    """A tensor of a checkpoint, in whatever form it is stored."""

    @property
    def spec(self) -> TensorSpec: ...

    def read(self, start: int, stop: int) -> DenseTensor:
        """Entries start … stop - 1 along the first axis."""
        ...


@dataclass(frozen=True, slots=True)
class PlainWeight:
    """See StoredWeight."""

    spec: TensorSpec
    tensor: StoredTensor

    def read(self, start: int, stop: int) -> DenseTensor:
        values = self.tensor.read(start, stop)
        return DenseTensor(self.spec.dtype, values.reshape(stop - start, *self.spec.shape[1:]))


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a checkpoint is quantised. fp8: in FP8, otherwise in MXFP4. block: rows and columns of a scale, if given."""

    fp8: bool
    block: tuple[int, int] | None = None


def quantisation(config: Mapping[str, Any]) -> Quantisation | None:
    """How the checkpoint of a config.json is quantised; SourceError for a way that is not read."""
    found = None
    inner = config.get("text_config")
    for own in (config, inner if isinstance(inner, dict) else {}):
        for key in KEYS:
            if own.get(key):
                found = _read(key, own[key] if isinstance(own[key], dict) else {})
    return found


def _read(key: str, own: Mapping[str, Any]) -> Quantisation:
    method = own.get("quant_method", "unknown")
    if method == "mxfp4":
        return Quantisation(fp8=False)
    if method in ("fp8", "fbgemm_fp8"):
        return Quantisation(fp8=True, block=_block(f"{key}: weight_block_size", own.get("weight_block_size")))
    if method == "compressed-tensors" and own.get("format") in ("float-quantized", "naive-quantized"):
        _refuse_more(key, own)
        groups = own.get("config_groups")
        parts = [*groups.values()] if isinstance(groups, dict) else []
        weights = [group.get("weights") for group in parts if isinstance(group, dict)]
        if len(parts) == 1 == len(weights) and isinstance(weights[0], dict) and weights[0].get("type") == "float":
            return Quantisation(fp8=True, block=_block(f"{key}: block_structure", weights[0].get("block_structure")))
    named = f"{method}, {own['format']}" if method == "compressed-tensors" and "format" in own else method
    shown = named if isinstance(named, str) else reprlib.repr(named)
    raise SourceError(f"already quantised ({key}: {shown}); give the original checkpoint, or one in FP8 or MXFP4")


def _refuse_more(key: str, own: Mapping[str, Any]) -> None:
    """Refuse what compressed-tensors may do beside codes and scales: the codes alone are then other weights."""
    transforms, sparsity = own.get("transform_config"), own.get("sparsity_config")
    if transforms.get("config_groups") if isinstance(transforms, dict) else transforms:
        raise SourceError(f"{key}: transform_config: transformed weights are not read; give the original checkpoint")
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format", "dense") == "dense"):
        raise SourceError(f"{key}: sparsity_config: sparse weights are not read; give the original checkpoint")


def _block(key: str, given: Any) -> tuple[int, int] | None:
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != 2 or any(type(each) is not int or each < 1 for each in given):
        raise SourceError(f"{key}: expected two integers of at least 1, got {reprlib.repr(given)}")
    return given[0], given[1]


def weights_of(
    tensors: Mapping[str, StoredTensor], how: Quantisation | None
) -> tuple[dict[str, StoredWeight], dict[str, StoredTensor]]:
    """The weights that a checkpoint's tensors make, and the tensors that are none (buffers of integers, for example).

    Raises SourceError for scales that do not belong to their weights.
    """
    found: dict[str, StoredWeight] = {}
    used: set[str] = set()
    for name, tensor in tensors.items():
        if how and how.fp8 and tensor.dtype == CODES:
            scales = next((name + end for end in _SCALES if name + end in tensors), name + _SCALES[0])
            found[name] = fp8_weight(name, tensor, (scales, tensors.get(scales)), how.block)
            used.add(scales)
        elif how and not how.fp8 and tensor.dtype == "U8" and name.endswith(BLOCKS):
            scales = name.removesuffix(BLOCKS) + SCALES
            found[name] = mxfp4_weight(name, tensor, tensors.get(scales))
            used.add(scales)
    others: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if name in found or name in used or (how and how.fp8 and _OF_ACTIVATIONS.fullmatch(name)):
            continue
        if 0 in tensor.shape or tensor.dtype not in _DENSE:
            others[name] = tensor
            continue
        shape = tensor.shape or (1,)  # a number without a dimension
        spec = TensorSpec(shape, _DENSE[tensor.dtype], tensor.dtype, tensor.stored_bytes)
        found[name] = PlainWeight(spec, tensor)
    return found, others


def refuse_unreadable(needed: Iterable[str], others: Mapping[str, StoredTensor]) -> None:
    """Raise SourceError if the model needs one of the tensors that are no weights."""
    for name in needed:
        if name in others and 0 in others[name].shape:
            raise SourceError(f"tensor {name}: expected values, got shape {list(others[name].shape)}")
        if name in others:
            dtypes = f"expected dtype BF16, F16 or F32, got {others[name].dtype}"
            raise SourceError(f"tensor {name}: {dtypes}; give the original checkpoint")
