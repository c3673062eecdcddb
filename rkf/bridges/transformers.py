"""Importing this module lets transformers load folders made by `rkf export transformers`: it registers a quantizer.

    import rkf.bridges.transformers
    model = AutoModelForCausalLM.from_pretrained(FOLDER)

The folder's `quantization_config` says which layers are clustered and how (`transformers_folder.py` writes it); this
module puts empty clustered layers in their places, and transformers loads the tensors as usual.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rkf.bridges.clustered_modules import (
    JoinedStack,
    JoinedWeight,
    make_clustered,
    make_stack_clustered,
    tie,
)
from rkf.bridges.transformers_export import module_names, tensor_names
from rkf.bridges.transformers_folder import METHOD, VERSION, Layer
from rkf.errors import UnsupportedError
from rkf.torch.clustered_layers import ClusteredLinear
from rkf.torch.weight import ClusteredWeight


@register_quantization_config(METHOD)
class RkfConfig(QuantizationConfigMixin):
    """`quantization_config` of a folder: see `rkf.bridges.transformers_folder`.

    Raises UnsupportedError for a folder of a later version.
    """

    def __init__(
        self,
        version: int = VERSION,
        layers: dict[str, Any] | None = None,
        stacks: dict[str, Any] | None = None,
        tied: dict[str, str] | None = None,
        container: str = "",
        **_: Any,
    ) -> None:
        if version != VERSION:
            raise UnsupportedError(f"quantization_config: version {version} of an rkf folder: update rkf")
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers' enum names its own methods only
        self.version, self.layers, self.stacks, self.tied = version, layers or {}, stacks or {}, tied or {}
        self.container = container


@register_quantizer(METHOD)
class RkfQuantizer(HfQuantizer):
    """Loads and saves clustered models; it clusters none itself (`rkf convert` does)."""

    quantization_config: RkfConfig

    def validate_environment(self, *_: Any, **__: Any) -> None:
        if not self.pre_quantized:
            raise UnsupportedError(
                "rkf does not cluster while loading: use `rkf convert` and `rkf export transformers`"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        own_name, tensor_name = module_names(model), tensor_names(model)
        for name, described in self.quantization_config.layers.items():
            layer = cast("nn.Linear | nn.Embedding", model.get_submodule(own_name(name)))
            make_clustered(layer, _blank_weight(Layer.from_json(described, name), model.dtype))
        for name, described in self.quantization_config.stacks.items():
            module, parameter = tensor_name(f"{name}.parts").removesuffix(".parts").rsplit(".clustered_", 1)
            stack = _blank_stack(Layer.from_json(described, name), model.dtype)
            make_stack_clustered(model.get_submodule(module), parameter, stack)
        if self.quantization_config.stacks:
            model.set_experts_implementation("eager")  # the others want the matrices of all experts
        for tied, source in self.quantization_config.tied.items():
            head, embedding = (model.get_submodule(own_name(each)) for each in (tied, source))
            tie(cast("nn.Linear", head), cast("nn.Embedding", embedding))
            model.all_tied_weights_keys.pop(f"{own_name(tied)}.weight", None)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _blank_weight(layer: Layer, dtype: torch.dtype) -> JoinedWeight:
    """A weight without storage, whose tensors are still to be loaded."""
    parts: list[ClusteredLinear | nn.Linear] = []
    for part in layer.parts:
        if part.clusters is None:
            parts.append(nn.Linear(part.shape[1], part.shape[0], bias=False, device="meta", dtype=dtype))
            continue
        parts.append(ClusteredLinear(ClusteredWeight.blank(part.clusters, part.most_exceptions)))
    return JoinedWeight(parts, [part.block for part in layer.parts], _blank_order(layer), dtype)


def _blank_stack(layer: Layer, dtype: torch.dtype) -> JoinedStack:
    parts = [ClusteredWeight.blank(part.clusters, part.most_exceptions) for part in layer.parts if part.clusters]
    return JoinedStack(parts, [part.block for part in layer.parts], _blank_order(layer), layer.transposed, dtype)


def _blank_order(layer: Layer) -> torch.Tensor | None:
    rows = sum(part.shape[-2] for part in layer.parts)
    return torch.empty(rows, dtype=torch.int64, device="meta") if layer.ordered else None
