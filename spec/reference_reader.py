"""A second reader of rkf files, from rkf-1.md alone: numpy, msgpack, zstandard, blake3, and nothing of the project.

`read(path)` or `read(path, values_path)` -> {name: f32[shape]}. Plain and slow on purpose. A file that breaks a rule
raises `Refused` with the level of section 17; what is said about `metadata.model`, and semantics, are left out. The
rules about the directory are in `reference_rules.py`.
"""

import struct
from pathlib import Path

import msgpack
import numpy as np
import zstandard
from blake3 import blake3
from reference_rules import CHUNK, PLANES, Refused, aligned, check_canonical, check_directory, need, values_layout

DTYPES = {"bf16": "<u2", "f16": "<f2", "f32": "<f4"}


def open_directory(data):
    """Section 4: the bytes of a file -> its kind and its directory."""
    need(len(data) < 128 or any(data[:128]), "never finished", "not-rkf")
    need(data and data[:8] == b"\x89RKF\r\n\x1a\n"[: len(data)], "magic", "not-rkf")
    need(len(data) >= 128, "shorter than a superblock")
    block = struct.unpack("<8sHHIQQQQQ32sQ32s", data[:128])
    _, major, _, kind, required, _, offset, length, size, directory_hash, reserved, block_hash = block
    need(block_hash == blake3(data[:96]).digest(), "superblock hash")
    need(major == 1, f"major {major}", "unsupported")
    need(required == 0 and kind != 3, f"required features {required:b}, kind {kind}", "unsupported")
    need(kind in (1, 2) and reserved == 0, "kind or reserved bytes")
    need(size == len(data) == offset + length and 1 <= length <= 64 << 20 and offset >= 128, "extents")
    need(directory_hash == blake3(data[offset:]).digest(), "directory hash")
    try:
        directory = msgpack.unpackb(data[offset:])
        need(check_canonical(directory) <= 1 << 19, "too many maps and arrays")
        need(msgpack.packb(directory) == data[offset:], "another encoding")
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise Refused("structure", f"not canonical: {error}") from error
    check_directory(kind, directory, offset)
    return kind, directory


def load_section(data, section):
    """The decoded bytes of a section, its hashes and the padding behind it checked (section 7)."""
    end = section["offset"] + section["length"]
    stored = data[section["offset"] : end]
    need(not any(data[end : aligned(end)]), "padding", "integrity")
    if section["codec"] == "zstd":
        need(blake3(stored).digest() == section["stored_hash"], "stored hash", "integrity")
        at, parts, left = 0, [], section["decoded_length"]
        for chunk in section["chunks"]:
            parts.append(load_chunk(stored[at : at + chunk], min(left, CHUNK)))
            at, left = at + chunk, left - CHUNK
        stored = b"".join(parts)
    need(blake3(stored).digest() == section["hash"], f"hash of {section['kind']}", "integrity")
    return stored


def load_chunk(frame, size):
    try:
        header = zstandard.get_frame_parameters(frame)
        fits = header.content_size == size and header.dict_id == 0 and header.window_size <= 1 << 27
        need(fits, "frame", "integrity")
        decoder = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
        chunk = decoder.decompress(frame)
    except zstandard.ZstdError as error:
        raise Refused("integrity", f"frame: {error}") from error
    need(len(chunk) == size and decoder.eof and not decoder.unused_data, "frame", "integrity")
    return chunk


def widen(array, dtype):
    """Values of a dense dtype as f32, exactly."""
    return (array.astype("<u4") << 16).view("<f4") if dtype == "bf16" else array.astype("<f4")


def read_values(directory, data):
    """{(tensor, field): f32 array}, checked (section 9)."""
    layout, end = values_layout(directory["tensors"])
    section = next((section for section in directory["sections"] if section["kind"] == "values"), None)
    values, stored = {}, load_section(data, section) if section else b""
    gaps = np.ones(end, bool)
    for (name, field), (offset, dtype, shape) in layout.items():
        array = np.frombuffer(stored, DTYPES[dtype], int(np.prod(shape)), offset).reshape(shape)
        gaps[offset : offset + array.nbytes] = False
        values[name, field] = array = widen(array, dtype)
        need(np.isfinite(array).all() and (field != "a" or (array > 0).all()), f"{name}: {field}", "integrity")
        ordered = field != "centroids" or directory.get("order") == "none" or (array[:, 1:] > array[:, :-1]).all()
        need(ordered, f"{name}: centroids not ascending", "integrity")
    need(not np.frombuffer(stored, "u1")[gaps].any(), "padding of values", "integrity")
    return values


def decode(tensor, affine, sections, values):
    """Sections 8 and 10: one clustered tensor -> f32[shape]."""
    name, shape = tensor["name"], tensor["shape"]
    rows, cols, bits = int(np.prod(shape[:-1])), shape[-1], (tensor["k"] - 1).bit_length()
    index = np.zeros((rows, cols), int)
    for number, width in zip(tensor["planes"], PLANES[bits], strict=True):
        plane = np.frombuffer(sections[number], "u1").reshape(rows, -1)
        fields = np.unpackbits(plane, axis=1, count=cols * width, bitorder="little").reshape(rows, cols, width)
        index = index << width | (fields << np.arange(width)).sum(2)
    centroids = np.pad(values[name, "centroids"], ((0, 0), (0, (1 << bits) - tensor["k"])))
    weights = centroids[np.arange(rows)[:, None] // tensor["rows_per_table"], index]
    for factor, apply in (("a", np.multiply), ("b", np.add)):
        if factor in affine:
            spread = np.repeat(values[name, factor], affine.get("group", cols), axis=1)
            weights = apply(weights, spread[:, :cols], dtype="<f4")
    if "exceptions" in tensor:
        stored = sections[tensor["exceptions"]["positions"]]
        positions = np.frombuffer(stored, "<u4" if rows * cols <= 1 << 32 else "<u8")
        ascending = (positions[1:] > positions[:-1]).all() and positions[-1] < rows * cols
        need(ascending, f"{name}: exception positions", "integrity")
        weights.reshape(-1)[positions] = values[name, "exceptions"]
    return weights.reshape(shape)


def bind(model, other):
    """Section 12: refuse values that are not for these ranks."""
    need(all(model[key] == other[key] for key in ("ranks_id", "dense_id")), "other ranks or dense tensors", "binding")
    forms = [
        [[t["name"], t["shape"], t["k"], t["rows_per_table"], t.get("exceptions", {}).get("count")] for t in tensors]
        for tensors in ([t for t in model["tensors"] if t["kind"] == "clustered"], other["tensors"])
    ]
    need(forms[0] == forms[1], "other tensors", "binding")


def read(path, values_path=None):
    """Every tensor of a model file, decoded with its own values or with those of a values file."""
    data = Path(path).read_bytes()
    kind, model = open_directory(data)
    need(kind == 1, "not a model file", "binding")
    sections, source, weights = [load_section(data, section) for section in model["sections"]], model, {}
    if values_path is not None:
        data = Path(values_path).read_bytes()
        kind, source = open_directory(data)
        need(kind == 2, "not a values file", "binding")
    values = read_values(source, data)
    if source is not model:
        bind(model, source)
    affine = {tensor["name"]: tensor.get("values", {}).get("affine", {}) for tensor in source["tensors"]}
    for tensor in sorted(model["tensors"], key=lambda tensor: tensor["kind"] == "alias"):
        if tensor["kind"] == "clustered":
            weights[tensor["name"]] = decode(tensor, affine[tensor["name"]], sections, values)
        elif tensor["kind"] == "dense":
            array = np.frombuffer(sections[tensor["data"]], DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
            weights[tensor["name"]] = widen(array, tensor["dtype"])
        else:
            weights[tensor["name"]] = weights[tensor["target"]]
    return weights
