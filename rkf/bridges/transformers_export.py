"""An .rkf file as a folder that transformers loads without decoding it (`rkf.bridges.transformers`)."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rkf.bridges.row_order import row_order, stacked_rows
from rkf.bridges.transformers_folder import METHOD, VERSION, Layer, LayerPart
from rkf.converters.export import Exported, WrittenTensor, staged_folder, write_file, write_safetensors
from rkf.converters.families.blocks import HEAD
from rkf.converters.families.layout import Assembly, Origin, Part, assemblies
from rkf.errors import UnsupportedError, UsageError
from rkf.file.container import open_file
from rkf.file.scratch import scratch
from rkf.format import canonical
from rkf.format.matrix import ClusteredMatrix
from rkf.format.values_layout import Clusters
from rkf.model.rotation import rotations
from rkf.torch.weight import ClusteredWeight

try:
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        WeightTransform,
    )
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
        found = _Layers(exported, _skeleton(config, file.path))
        config["quantization_config"] = {
            "quant_method": METHOD,
            "version": VERSION,
            "layers": {name: layer.to_json() for name, layer in found.layers.items()},
            "stacks": {name: stack.to_json() for name, stack in found.stacks.items()},
            "tied": found.tied,
            "container": base64.b64encode(
                canonical.encode({"metadata": file.metadata, "provenance": file.provenance})
            ).decode(),
        }
        write_safetensors(staging / "model.safetensors", found.tensors())
        for name, content in {**files, "config.json": (json.dumps(config, indent=2) + "\n").encode()}.items():
            write_file(staging / name, content)
        file.refuse_changed()
        return found.decoded


def module_names(model: transformers.PreTrainedModel) -> Callable[[str], str]:
    """From the names of a checkpoint's modules to those in transformers' model, which differ for some families."""
    own = tensor_names(model)
    return lambda name: own(f"{name}.weight").removesuffix(".weight")


def tensor_names(model: transformers.PreTrainedModel) -> Callable[[str], str]:
    """The same of tensors, before any of them are merged."""
    return _renamed([each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)])


def _stored_names(model: transformers.PreTrainedModel) -> Callable[[str], str]:
    """From the names of tensors in transformers' model to those that `save_pretrained` writes."""
    renamings = get_model_conversion_mapping(model, add_legacy=False)
    return _renamed([each.reverse_transform() for each in reversed(renamings) if isinstance(each, WeightRenaming)])


def _renamed(renamings: Sequence[WeightTransform]) -> Callable[[str], str]:
    def own(name: str) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    return own


def _skeleton(config: Mapping[str, Any], path: Path) -> transformers.PreTrainedModel:
    """transformers' own model of this config.json, without storage."""
    with scratch() as folder:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            known = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            with torch.device("meta"):
                return transformers.AutoModelForCausalLM.from_config(known)
        except Exception as error:  # noqa: BLE001 - transformers raises what its parts happen to raise
            reason = " ".join(str(error).split())[:300]
            raise UnsupportedError(f"{path}: config.json: transformers makes no model of it: {reason}") from None


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
        found = list(assemblies(exported.description.layout, exported.shapes))
        self.stacks, in_stacks = self._stacks(model, found)
        for assembly in found:
            if assembly.name in in_stacks:
                continue
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
        order = row_order(assembly, self._exported.shapes)
        if order is None:
            return None
        ordered = bool((order != np.arange(len(order))).any())
        if isinstance(module, nn.Embedding) and (len(assembly.parts) > 1 or ordered):
            return None
        if ordered:
            self._orders[f"{assembly.name.removesuffix('.weight')}.clustered"] = order
        return Layer(tuple(self._part(part.tensor) for part in assembly.parts), ordered)

    def _stacks(
        self, model: transformers.PreTrainedModel, found: Sequence[Assembly]
    ) -> tuple[dict[str, Layer], set[str]]:
        """The parameters of all experts' matrices, and the tensors of the checkpoint that they are made of."""
        own_name, stored_name = tensor_names(model), _stored_names(model)
        stacks, used = dict[str, Layer](), set[str]()
        by_name = {own_name(assembly.name): assembly for assembly in found}
        for name, parameter in model.named_parameters():
            sources = _sources(name, model, by_name) if parameter.ndim == 3 else []
            tensors = list(dict.fromkeys(part.tensor for assembly in sources for part in assembly.parts))
            if not tensors or not all(self._clusters(tensor) for tensor in tensors):
                continue
            placed = stacked_rows(sources, {tensor: self._exported.shapes[tensor] for tensor in tensors})
            if placed is None:
                continue
            order, transposed = placed
            ordered = bool((order != np.arange(len(order))).any())
            module, _, own = name.rpartition(".")
            stored = stored_name(f"{module}.clustered_{own}.parts").removesuffix(".parts")
            stacks[stored] = Layer(tuple(map(self._part, tensors)), ordered, transposed)
            self._orders[stored] = order
            used |= {assembly.name for assembly in sources}
        return stacks, used

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
                yield self._order(f"{name}.clustered")
        for name, stack in self.stacks.items():
            for number, part in enumerate(stack.parts):
                yield from self._part_tensors(f"{name}.parts.{number}", part)
            if stack.ordered:
                yield self._order(name)

    def _order(self, name: str) -> WrittenTensor:
        order = self._orders[name]
        return WrittenTensor(f"{name}.order", "I64", order.shape, partial(np.asarray, order))

    def _part_tensors(self, name: str, part: LayerPart) -> Iterator[WrittenTensor]:
        if part.clusters is None:
            own = Assembly(name, part.shape, (Part(part.tensor, Origin((name,), (slice(0, part.shape[0]),)), 0),))
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


def _sources(name: str, model: transformers.PreTrainedModel, found: Mapping[str, Assembly]) -> list[Assembly]:
    """The tensors of the checkpoint that a parameter is made of, in its order: one that holds it whole, or those that
    transformers stacks. found: by their names in transformers' model. Empty for any other making.
    """
    if name in found:
        return [found[name]]
    for converter in get_model_conversion_mapping(model):
        target = converter.target_patterns[0]
        if not isinstance(converter, WeightConverter) or not name.endswith(target):
            continue
        kinds = [type(each) for each in converter.operations]
        joined = all(each.dim == 1 for each in converter.operations if isinstance(each, Concatenate))
        if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate]) or not joined:
            return []
        prefix, experts = name.removesuffix(target), model.get_parameter(name).shape[0]
        wanted = [f"{prefix}{each.replace('*', str(n))}" for each in converter.source_patterns for n in range(experts)]
        return [found[each] for each in wanted] if all(each in found for each in wanted) else []
    return []
