"""An .rkf file as a folder that transformers loads without decoding it (`rkf.bridges.transformers`)."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rkf.bridges.transformers_folder import METHOD, VERSION, Layer, LayerPart
from rkf.converters.export import Exported, WrittenTensor, staged_folder, write_file, write_safetensors
from rkf.converters.families.blocks import HEAD
from rkf.converters.families.layout import Assembly, Origin, Part, assemblies
from rkf.converters.families.layout_transforms import Shape, Values
from rkf.errors import UsageError
from rkf.file.container import open_file
from rkf.format import canonical
from rkf.format.matrix import ClusteredMatrix
from rkf.format.values_layout import Clusters
from rkf.model.rotation import rotations
from rkf.torch.weight import ClusteredWeight

try:
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming
except ImportError as error:
    raise UsageError("this needs transformers, which is not installed: pip install 'rkf-llm[transformers]'") from error

_SAFETENSORS = {torch.uint8: "U8", torch.int64: "I64", torch.float32: "F32"}


def export_transformers(path: str | Path, folder: str | Path) -> list[str]:
    """Write the model at `path` as a folder for `AutoModelForCausalLM.from_pretrained`, clustered as it is.

    Returns the clustered tensors that had to be decoded, because no Linear or Embedding of transformers' model holds
    them alone. Raises UsageError if the folder exists and is not empty, UnsupportedError for a file without the
    configuration of a known family, and the errors of opening `path`.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: exists already: choose another name for the folder")
    with open_file(path) as file, staged_folder(folder) as staging:
        exported = Exported(file)
        files = exported.configuration()
        config = json.loads(files["config.json"])
        found = _Layers(exported, _skeleton(config))
        config["quantization_config"] = {
            "quant_method": METHOD,
            "version": VERSION,
            "layers": {name: layer.to_json() for name, layer in found.layers.items()},
            "tied": found.tied,
            "container": base64.b64encode(
                canonical.encode({"metadata": file.metadata, "provenance": file.provenance})
            ).decode(),
        }
        write_safetensors(staging / "model.safetensors", found.tensors())
        for name, content in {**files, "config.json": (json.dumps(config, indent=2) + "\n").encode()}.items():
            write_file(staging / name, content)
        return found.decoded


def module_names(model: transformers.PreTrainedModel) -> Callable[[str], str]:
    """From the names of a checkpoint's modules to those in transformers' model, which differ for some families."""
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]

    def own(name: str) -> str:
        name += ".weight"
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name.removesuffix(".weight")

    return own


def _skeleton(config: Mapping[str, Any]) -> transformers.PreTrainedModel:
    """transformers' own model of this config.json, without storage."""
    own = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        known = transformers.AutoConfig.for_model(config["model_type"], **own)
        return transformers.AutoModelForCausalLM.from_config(known)


class _Layers:
    """The layers of transformers' model that hold a file's clustered matrices, and the tensors of the folder.

    decoded: clustered tensors of the file that no such layer holds.
    """

    def __init__(self, exported: Exported, model: transformers.PreTrainedModel) -> None:
        self._exported, self._file = exported, exported.file
        self._blocks = rotations(exported.model.program)
        self._orders: dict[str, NDArray[np.int64]] = {}
        self._dense: list[Assembly] = []
        # The last matrix, because its fields come one after the other.
        self._loaded: tuple[str, Mapping[str, torch.Tensor]] | None = None
        self.layers: dict[str, Layer] = {}
        self.decoded: list[str] = []
        modules, own_name = dict(model.named_modules()), module_names(model)
        for assembly in assemblies(exported.description.layout, exported.shapes):
            name = assembly.name.removesuffix(".weight")
            layer = self._layer(assembly, modules.get(own_name(name)))
            if layer is not None:
                self.layers[name] = layer
                continue
            self._dense.append(assembly)
            tensors = dict.fromkeys(part.tensor for part in assembly.parts)
            self.decoded += [each for each in tensors if self._clusters(each) and each not in self.decoded]
        self.tied = self._tied()

    def _clusters(self, tensor: str) -> Clusters | None:
        return self._file.tensors[tensor].clusters

    def _layer(self, assembly: Assembly, module: nn.Module | None) -> Layer | None:
        """The layer of a tensor of the checkpoint; None unless it is clustered and only its rows move."""
        clustered = any(self._clusters(part.tensor) for part in assembly.parts)
        if not clustered or not isinstance(module, nn.Linear | nn.Embedding):
            return None
        order = _row_order(assembly, self._exported.shapes)
        if order is None:
            return None
        ordered = bool((order != np.arange(len(order))).any())
        if isinstance(module, nn.Embedding) and (len(assembly.parts) > 1 or ordered):
            return None
        if ordered:
            self._orders[assembly.name] = order
        return Layer(tuple(self._part(part.tensor) for part in assembly.parts), ordered)

    def _part(self, tensor: str) -> LayerPart:
        clusters = self._clusters(tensor)
        if clusters is None:  # dense ones are stored turned back
            return LayerPart(tensor, self._exported.shapes[tensor], self._exported.dtypes[tensor], None, None)
        most = self._weight(tensor).most_exceptions if clusters.exceptions else 0
        dtype = self._exported.dtypes[tensor]
        return LayerPart(tensor, clusters.shape, dtype, self._blocks.get(tensor), clusters, most)

    def _tied(self) -> dict[str, str]:
        target = self._file.tensors[HEAD].target if HEAD in self._file.tensors else None
        if target is None:
            return {}
        layout = self._exported.description.layout
        head, source = (layout(name)[0].names[0].removesuffix(".weight") for name in (HEAD, target))
        return {head: source} if source in self.layers else {}

    def tensors(self) -> Iterator[WrittenTensor]:
        """All tensors of the folder."""
        yield from map(self._exported.stored, self._dense)
        for name, layer in self.layers.items():
            for number, part in enumerate(layer.parts):
                yield from self._part_tensors(f"{name}.clustered.parts.{number}.weight", part)
            if layer.ordered:
                order = self._orders[f"{name}.weight"]
                yield WrittenTensor(f"{name}.clustered.order", "I64", order.shape, partial(np.asarray, order))

    def _part_tensors(self, name: str, part: LayerPart) -> Iterator[WrittenTensor]:
        if part.clusters is None:
            own = Assembly(name, part.shape, (Part(part.tensor, Origin((name,), (slice(0, part.shape[0]),)), None),))
            yield self._exported.stored(own)
            return
        for key, tensor in ClusteredWeight.blank(part.clusters, part.most_exceptions).state_dict().items():
            data = partial(self._field, part.tensor, key)
            yield WrittenTensor(f"{name}.{key}", _SAFETENSORS[tensor.dtype], tuple(tensor.shape), data)

    def _weight(self, tensor: str) -> ClusteredWeight:
        return ClusteredWeight(cast("ClusteredMatrix", self._file.load(tensor)))

    def _field(self, tensor: str, key: str) -> NDArray[Any]:
        if self._loaded is None or self._loaded[0] != tensor:
            self._loaded = tensor, self._weight(tensor).state_dict()
        return self._loaded[1][key].numpy()


def _row_order(assembly: Assembly, shapes: Mapping[str, Shape]) -> NDArray[np.int64] | None:
    """Which row of the parts, one below the other, is each row of the checkpoint's tensor; None if not only rows move.

    Found by laying out a tensor of two columns whose values say where they are from.
    """
    if len(assembly.shape) != 2 or any(len(part.origin.part) > 1 or part.expert is not None for part in assembly.parts):
        return None
    codes: dict[str, Values] = {}
    start = 0
    for part in assembly.parts:
        rows = shapes[part.tensor][0]
        codes[part.tensor] = 2 * np.arange(start, start + rows)[:, None] + np.arange(2)
        start += rows
    try:
        found = replace(assembly, shape=(assembly.shape[0], 2)).values(codes.__getitem__)
    except (ValueError, IndexError):  # a transform that needs all columns, or changes the shape
        return None
    order = found[:, 0].astype(np.int64) // 2
    return order if (found == 2 * order[:, None] + np.arange(2)).all() else None
