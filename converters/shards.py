"""The safetensors files of a checkpoint: which there are, and the tensors in each. Knows no model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from rkf.converters import input_files
from rkf.converters.families.keys import is_unicode
from rkf.converters.input_files import read_json, refuse_pointer
from rkf.errors import SourceError
from rkf.format.constants import MAX_BLOB_BYTES

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_MOST_NAME = 255  # bytes that a name may have on most file systems
# Types that are read -> how their values are held. 8-bit floats are held as their bits.
_HELD = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "U8": "u1", "F8_E4M3": "u1", "F8_E8M0": "u1"}


class WeightReader(Protocol):
    """Reads safetensors files: those of this machine (`input_files`), or of the hub by what stands for them here
    (`hub_checkpoint`).
    """

    def read_values(self, path: Path, dtype: np.dtype[Any], count: int, offset: int) -> NDArray[Any]: ...
    def hash_file(self, path: Path) -> str: ...


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file. dtype: the format's name. offset: of its first byte in the file. weights: reads
    the file.
    """

    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    stored_bytes: int
    weights: WeightReader

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Entries start … stop - 1 along the first axis, by default all of them."""
        first = self.shape[0] if self.shape else 1
        stop = first if stop is None else stop
        held = np.dtype(_HELD[self.dtype])
        each = self.stored_bytes // held.itemsize // first
        values = self.weights.read_values(
            self.path, held, (stop - start) * each, self.offset + start * each * held.itemsize
        )
        return values.reshape(stop - start, *self.shape[1:]) if self.shape else values.reshape(())


def shards(folder: Path) -> list[Path]:
    """Every safetensors file of the checkpoint: a whole one, as in transformers, before those that an index names."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _indexed(folder)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise SourceError(
            f"{folder}: only pickled weights ({pickles[0]}): pickle runs code and is never read; "
            "save the model with safe_serialization=True"
        )
    raise SourceError(f"{folder}: neither {SINGLE} nor {INDEX}")


def listed_shards(folder: Path) -> list[str]:
    """The names of the files in a checkpoint's index, in name order, whether they are there or not."""
    weight_map = read_json(folder / INDEX, most=MAX_BLOB_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{folder}: {INDEX} has no weight_map")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        plain = Path(name).name == name and "\\" not in name and is_unicode(name) and len(name.encode()) <= _MOST_NAME
        if not plain or not name.endswith(".safetensors"):
            raise SourceError(f"{folder}: {INDEX}: {name!r} is not the plain name of a safetensors file")
    return names


def _indexed(folder: Path) -> list[Path]:
    names = listed_shards(folder)
    for name in names:
        if not (folder / name).is_file():
            raise SourceError(f"{folder}: shard {name} is missing; {INDEX} names it")
    return [folder / name for name in names]


def tensors_of(path: Path, weights: WeightReader = input_files) -> Mapping[str, StoredTensor]:
    """The tensors of a file by name, after the library has checked the whole header."""
    refuse_pointer(path)
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise SourceError(f"{path}: not a safetensors file, truncated or damaged ({error})") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = StoredTensor(
            entry["dtype"], tuple(entry["shape"]), path, 8 + length + begin, end - begin, weights
        )
    return found
