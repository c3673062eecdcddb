"""What config.json says of a folder that transformers loads without decoding: which layers are clustered, and how.

`quantization_config`:

    quant_method  "rkf"
    version       1
    layers        name of a Linear or Embedding in the checkpoint -> {"parts": […], "ordered": bool}. A part is a
                  matrix: tensor (its name in the file), shape, source_dtype, block (of its inputs' Hadamard transform,
                  or null), clusters (as in the file's directory, null for a dense part), most_exceptions (of a row)
    stacks        MODULE.clustered_PARAMETER, for a parameter with the matrices of all experts -> the same, and
                  "transposed": whether the parameter holds each matrix transposed
    tied          name of a layer -> the layer whose weight it uses
    container     the file's metadata and provenance, canonical msgpack in base 64

A matrix is stored as LAYER.clustered.parts.N.weight.{plane0, …, centroids, a, b, positions, exceptions}, as in
`rkf.torch.ClusteredWeight`; one of a stack as MODULE.clustered_PARAMETER.parts.N.{plane0, …}. All others are dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rkf.errors import SourceError
from rkf.format.constants import DTYPE_BYTES
from rkf.format.tensors import parse_clusters
from rkf.format.values_layout import Clusters

METHOD, VERSION = "rkf", 1


@dataclass(frozen=True, slots=True)
class LayerPart:
    """A matrix of the file that gives a layer some of its rows. clusters: None for a dense matrix."""

    tensor: str
    shape: tuple[int, ...]
    source_dtype: str
    block: int | None
    clusters: Clusters | None
    most_exceptions: int = 0

    def to_json(self) -> dict[str, Any]:
        clusters = None if self.clusters is None else self.clusters.to_map()
        return {
            "tensor": self.tensor,
            "shape": list(self.shape),
            "source_dtype": self.source_dtype,
            "block": self.block,
            "clusters": clusters,
            "most_exceptions": self.most_exceptions,
        }

    @classmethod
    def from_json(cls, item: Mapping[str, Any], where: str) -> LayerPart:
        """Raises KeyError, TypeError or StructureError for anything but what `to_json` makes."""
        clusters, shape, block = item["clusters"], tuple(item["shape"]), item["block"]
        parsed = None if clusters is None else parse_clusters(clusters, f"{where}, clusters")
        tensor, dtype, most = item["tensor"], item["source_dtype"], item["most_exceptions"]
        if not isinstance(tensor, str) or not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise TypeError("tensor is a text, source_dtype one of the file's")
        if not all(type(each) is int for each in (*shape, most, 0 if block is None else block)):
            raise TypeError("shape, block and most_exceptions are integers")
        return cls(tensor, shape, dtype, block, parsed, most)


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's matrices, or a parameter's stacks. ordered: whether its rows are in another order than theirs.
    transposed: of a stack, whether the parameter holds the matrices transposed.
    """

    parts: tuple[LayerPart, ...]
    ordered: bool
    transposed: bool = False

    def to_json(self) -> dict[str, Any]:
        turned = {"transposed": True} if self.transposed else {}
        return {"parts": [part.to_json() for part in self.parts], "ordered": self.ordered, **turned}

    @classmethod
    def from_json(cls, item: Mapping[str, Any], name: str) -> Layer:
        """Raises SourceError that names the layer, for anything but what `to_json` makes."""
        where = f"quantization_config, layer {name}"
        try:
            parts = tuple(LayerPart.from_json(part, where) for part in item["parts"])
            return cls(parts, bool(item["ordered"]), bool(item.get("transposed", False)))
        except (KeyError, TypeError, AttributeError) as error:
            raise SourceError(f"{where}: expected parts with tensor, shape, block, clusters: {error!r}") from error
