"""A second reader of rkf files, from rkf-1.md alone: numpy, msgpack, zstandard, blake3, and nothing of the project.

`read(path)` or `read(path, values_path)` -> {name: f32[shape]}; `read(path, planes=1)` uses only the first planes.
Plain and slow on purpose. It makes the checks against damage (hashes, padding, versions, values, pairs of files) and
raises `Refused(level, detail)`; tests/hostile/strict.py has the other rules of section 17, reference_parts.py parts.
"""

import math
import struct
from pathlib import Path

import msgpack
import numpy as np
import zstandard
from blake3 import blake3

DTYPES = {"bf16": np.dtype("<u2"), "f16": np.dtype("<f2"), "f32": np.dtype("<f4")}
PLANES = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [4, 4]}  # bits of an index: widths


class Refused(Exception):
    """Raised with (level, detail)."""


def need(condition, detail, level="structure"):
    if not condition:
        raise Refused(level, detail)


def aligned(offset):
    return -(-offset // 64) * 64


def open_directory(data, wanted, features=4):
    """Section 4: the bytes of a file of the wanted kind -> its directory. features: the required bits to accept."""
    need(len(data) < 128 or any(data[:128]), "never finished", "not-rkf")
    need(data and data[:8] == b"\x89RKF\r\n\x1a\n"[: len(data)], "magic", "not-rkf")
    need(len(data) >= 128, "shorter than a superblock")
    block = struct.unpack("<8sHHIQQQQQ32sQ32s", data[:128])
    _, major, _, kind, required, _, offset, length, size, directory_hash, reserved, block_hash = block
    need(block_hash == blake3(data[:96]).digest(), "superblock hash")
    need(major == 1 and required | features == features and (kind != 3 or required & 1), "unknown", "unsupported")
    need(kind in (1, 2, 3) and (kind, required & 1) != (2, 1) and reserved == 0, "kind or reserved bytes")
    need(size == len(data) == offset + length and 1 <= length <= 64 << 20 and offset >= 128, "extents")
    need(directory_hash == blake3(data[offset:]).digest(), "directory hash")
    need(kind == wanted, "a model where values were expected, or the reverse", "binding")
    return msgpack.unpackb(data[offset:])


def load_section(data, section):
    """The decoded bytes of a section; checks its hashes and the padding after it (section 7)."""
    end = section["offset"] + section["length"]
    stored = data[section["offset"] : end]
    need(not any(data[end : aligned(end)]), "padding", "integrity")
    if section["codec"] == "zstd":
        need(blake3(stored).digest() == section["stored_hash"], "stored hash", "integrity")
        frames = np.split(np.frombuffer(stored, "u1"), np.cumsum(section["chunks"])[:-1])
        stored = b"".join(zstandard.ZstdDecompressor().decompress(frame.tobytes()) for frame in frames)
    need(blake3(stored).digest() == section["hash"], f"hash of {section['kind']}", "integrity")
    return stored


def widen(data, dtype):
    """Values of a dense dtype as f32, exactly."""
    array = np.frombuffer(data, DTYPES[dtype])
    return (array.astype("<u4") << 16).view("<f4") if dtype == "bf16" else array.astype("<f4")


def value_fields(tensor):
    """[(field, dtype, shape)] of the values of one clustered tensor, in their order (section 9)."""
    rows, cols = math.prod(tensor["shape"][:-1]), tensor["shape"][-1]
    affine = tensor["values"].get("affine", {})
    fields = [("centroids", "f32", (-(-rows // tensor["rows_per_table"]), tensor["k"]))]
    shapes = {"tensor": (1, 1), "row": (rows, 1), "group": (rows, -(-cols // affine.get("group", cols)))}
    fields += [(factor, affine[factor], shapes[affine["granularity"]]) for factor in "ab" if factor in affine]
    exact = [tensor["exceptions"]["count"]] if "exceptions" in tensor else []
    return fields + [("exceptions", tensor["values"]["exceptions"], (count,)) for count in exact]


def read_values(directory, data):
    """{(tensor, field): f32 array} of the values section, checked (section 9)."""
    stored = b"".join(load_section(data, section) for section in directory["sections"] if section["kind"] == "values")
    values, end = {}, 0
    for tensor in directory["tensors"]:
        for field, dtype, shape in value_fields(tensor) if "values" in tensor else []:
            start, end = aligned(end), aligned(end) + math.prod(shape) * DTYPES[dtype].itemsize
            array = widen(stored[start:end], dtype).reshape(shape)
            free = field != "centroids" or directory.get("order") == "none"
            sound = np.isfinite(array).all() and (free or (array[:, 1:] > array[:, :-1]).all())
            sound = sound and (field != "a" or (array > 0).all()) and not any(stored[end : aligned(end)])
            need(sound, f"{tensor['name']}: {field}", "integrity")
            values[tensor["name"], field] = array
    return values


def merge(centroids, counts, members):
    """Section 13: merges each group of `members` neighbouring centroids into one, weighted by their counts."""
    merged = []
    for first in range(0, centroids.shape[1], members):
        weight = counts[:, first : first + members].astype("f8")
        weight[weight.sum(1) == 0] = 1
        sums = np.cumsum(weight * centroids[:, first : first + members], axis=1)[:, -1]
        merged.append(((sums + 0.0) / np.cumsum(weight, axis=1)[:, -1]).astype("f4"))
    return np.stack(merged, axis=1)


def decode(tensor, affine, sections, values, planes=None):
    """Sections 8, 10 and 13: one clustered tensor, from all its planes or the first `planes` -> f32[shape]."""
    rows, cols = math.prod(tensor["shape"][:-1]), tensor["shape"][-1]
    name, bits = tensor["name"], (tensor["k"] - 1).bit_length()
    index, used = np.zeros((rows, cols), int), PLANES[bits][:planes]
    for number, width in zip(tensor["planes"], used, strict=False):
        plane = np.frombuffer(sections[number], "u1").reshape(rows, -1)
        fields = np.unpackbits(plane, axis=1, count=cols * width, bitorder="little").reshape(rows, cols, width)
        index = index << width | (fields << np.arange(width)).sum(2)
    centroids = values[name, "centroids"]
    if sum(used) < bits:
        counts = np.frombuffer(sections[tensor["counts"]], "<u8").reshape(centroids.shape)
        centroids = merge(centroids, counts, 1 << bits - sum(used))
    centroids = np.pad(centroids, ((0, 0), (0, (1 << sum(used)) - centroids.shape[1])))
    weights = centroids[np.arange(rows)[:, None] // tensor["rows_per_table"], index]
    for factor, apply in (("a", np.multiply), ("b", np.add)):
        if factor in affine:
            weights = apply(weights, np.repeat(values[name, factor], affine.get("group", cols), 1)[:, :cols])
    if "exceptions" in tensor:
        stored = sections[tensor["exceptions"]["positions"]]
        positions = np.frombuffer(stored, "<u4" if rows * cols <= 1 << 32 else "<u8")
        need((positions[1:] > positions[:-1]).all() and positions[-1] < rows * cols, name, "integrity")
        weights.reshape(-1)[positions] = values[name, "exceptions"]
    return weights.reshape(tensor["shape"])


def read(path, values_path=None, planes=None):
    """Every tensor of a model file, decoded with its own values or with those of a values file (section 12)."""
    model = open_directory(data := Path(path).read_bytes(), 1)
    sections, source = [load_section(data, section) for section in model["sections"]], model
    if values_path is not None:
        source = open_directory(data := Path(values_path).read_bytes(), 2)
        need(all(source[key] == model[key] for key in ("ranks_id", "dense_id")), "values of other ranks", "binding")
    values, weights = read_values(source, data), {}
    affine = {tensor["name"]: tensor.get("values", {}).get("affine", {}) for tensor in source["tensors"]}
    for tensor in sorted(model["tensors"], key=lambda tensor: tensor["kind"] == "alias"):
        name, kind = tensor["name"], tensor["kind"]
        if kind == "clustered":
            weights[name] = decode(tensor, affine[name], sections, values, planes)
        elif kind == "dense":
            weights[name] = widen(sections[tensor["data"]], tensor["dtype"]).reshape(tensor["shape"])
        else:
            weights[name] = weights[tensor["target"]]
    return weights
