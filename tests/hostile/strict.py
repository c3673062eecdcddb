"""The reference reader made strict: every refusal of rkf-1.md at structure and integrity, a second time and apart.

`read(path, values)` checks the rules of sections 5 to 7, 9, 11 and 12 and then reads as spec/reference_reader.py does;
programs are checked by tests/hostile/strict_program.py. What spec/metadata.md says, and semantics, are left out. It
shares no code with the project's reader, so that the tests may compare the two.
"""

import math
import tempfile
from pathlib import Path

import msgpack
import zstandard
from blake3 import blake3

from tests.hostile import strict_parts, strict_program
from tests.spec import reference
from tests.spec.reference import DTYPES, PLANES, Refused, aligned, need, value_fields

CHUNK = 16 << 20
TYPES = {"map": dict, "list": list, "str": str, "hash": bytes, "uint": int}
DIRECTORY = "dense_id:hash ranks_id:hash metadata:map provenance:map sections:list tensors:list"
SECTION = "codec:raw|zstd hash:hash kind:str length:uint offset:uint"
ZSTD = " chunks:list decoded_length:uint stored_hash:hash"
VALUES = "kind:str name:str k:uint rows_per_table:uint shape:list values:map exceptions?:map"
TENSOR = {
    "clustered": VALUES + " counts:uint planes:list source_dtype:bf16|f16|f32 stats?:map",
    "dense": "kind:str name:str data:uint dtype:bf16|f16|f32 shape:list stats?:map",
    "alias": "kind:str name:str target:str",
    "values": VALUES,
}
AFFINE = "a?:f16|f32 b?:f16|f32 granularity:tensor|row|group"


def is_uint(value):
    return type(value) is int and value >= 0


def check_map(entry, keys, where):
    """Exactly these keys, each of its type or one of its words; `key?` may be absent, `x-…` may be there."""
    need(type(entry) is dict, f"{where} is not a map")
    rules = dict(rule.split(":") for rule in keys.split())
    for key in entry:
        need(key in rules or f"{key}?" in rules or key.startswith("x-"), f"{where}: unknown key {key!r}")
    for key, rule in rules.items():
        if not key.endswith("?") or key[:-1] in entry:
            value = entry.get(key.rstrip("?"))
            fits = type(value) is TYPES[rule] if rule in TYPES else type(value) is str and value in rule.split("|")
            fits = fits and (rule != "uint" or value >= 0) and (rule != "hash" or len(value) == 32)
            need(fits, f"{where}: {key} is {value!r}, not {rule}")


def check_names(names):
    for name in names:
        need(type(name) is str and 1 <= len(name.encode()) <= 255, f"name {name!r}")
        need(not any(c < " " or "\x7f" <= c < "\xa0" for c in name), f"control character in name {name!r}")
    need(sorted(set(names), key=str.encode) == names, "names repeated or out of order")


def check_canonical(value, depth=1):
    """Section 5: what encoding a second time does not show; counts the maps and arrays, and the other values."""
    containers, others = 0, 1
    if type(value) in (dict, list):
        need(depth <= 8, "too deep")
        need(type(value) is list or list(value) == sorted(value, key=str.encode), "keys out of order")
        items = value.values() if type(value) is dict else value
        counts = [check_canonical(item, depth + 1) for item in items]
        containers, others = 1 + sum(count[0] for count in counts), sum(count[1] for count in counts)
    else:
        need(type(value) in (str, bytes, int, bool, float), f"not a canonical type: {value!r}")
        need(repr(value) not in ("nan", "inf", "-inf", "-0.0"), f"not a canonical float: {value!r}")
    return containers, others


def check_tensor(tensor):
    """Keys, shape and clusters of one tensor (section 6)."""
    name, form = tensor["name"], tensor["kind"]
    check_map(tensor, TENSOR[form], name)
    for key, number in tensor.get("stats", {}).items():
        need(type(number) in (int, float) or key.startswith("x-"), f"{name}: stats")
    if form == "alias":
        return
    shape, least = tensor["shape"], 1 if form == "dense" else 2
    need(least <= len(shape) <= 4 and all(is_uint(n) and n > 0 for n in shape), f"{name}: shape {shape}")
    need(math.prod(shape) <= 1 << 48, f"{name}: shape {shape}")
    if form == "dense":
        return
    k, values, exceptions = tensor["k"], tensor["values"], tensor.get("exceptions")
    need(2 <= k <= 256 and 1 <= tensor["rows_per_table"] <= math.prod(shape[:-1]), f"{name}: k or rows_per_table")
    check_map(values, "affine?:map" + " exceptions:bf16|f16|f32" * (exceptions is not None), name)
    if "affine" in values:
        affine = values["affine"]
        check_map(affine, AFFINE + " group:uint" * (affine.get("granularity") == "group"), name)
        need(affine.get("group", 32) in (32, 64, 128, 256) and affine.keys() & {"a", "b"}, f"{name}: affine {affine}")
    if exceptions is not None:
        check_map(exceptions, "count:uint" + " positions:uint" * (form == "clustered"), name)
        need(1 <= exceptions["count"] <= math.prod(shape) // 8, f"{name}: exceptions")


def tensor_sections(tensor):
    """[(number, kind, decoded bytes)] of the sections of one tensor (section 7)."""
    if tensor["kind"] == "dense":
        return [(tensor["data"], "dense", math.prod(tensor["shape"]) * DTYPES[tensor["dtype"]].itemsize)]
    if tensor["kind"] != "clustered":
        return []
    *rows, cols = tensor["shape"]
    rows, k, widths = math.prod(rows), tensor["k"], PLANES[(tensor["k"] - 1).bit_length()]
    need(len(tensor["planes"]) == len(widths), f"{tensor['name']}: planes")
    sections = [(n, "plane", rows * -(-cols * width // 8)) for n, width in zip(tensor["planes"], widths, strict=True)]
    sections.append((tensor["counts"], "counts", 8 * k * -(-rows // tensor["rows_per_table"])))
    if "exceptions" in tensor:
        count, position_bytes = tensor["exceptions"]["count"], 4 if rows * cols <= 1 << 32 else 8
        sections.append((tensor["exceptions"]["positions"], "positions", count * position_bytes))
    return sections


def values_bytes(tensors):
    """The length of the values section."""
    end = 0
    for tensor in tensors:
        for _, dtype, shape in value_fields(tensor) if "values" in tensor else []:
            end = aligned(end) + math.prod(shape) * DTYPES[dtype].itemsize
    return end


def check_section(section, kind, size, offset):
    """One section against what is planned for its place; size is None for a blob (sections 6 and 7)."""
    where = f"{kind} section at {offset}"
    check_map(section, SECTION + ZSTD * (section.get("codec") == "zstd") + " name:str" * (kind == "blob"), where)
    need(section["kind"] == kind and section["offset"] == offset, f"{where}: {section}")
    length, decoded = section["length"], section["length"]
    if section["codec"] == "zstd":
        chunks, decoded = section["chunks"], section["decoded_length"]
        need(all(is_uint(n) and n > 0 for n in chunks) and sum(chunks) == length, f"{where}: chunks")
        need(len(chunks) == -(-decoded // CHUNK) and decoded <= 256 * length, f"{where}: {decoded} decoded bytes")
    need(kind != "blob" or decoded <= 64 << 20, f"{where}: too large")
    need(length > 0 and decoded == (decoded if size is None else size), f"{where}: {decoded} bytes, not {size}")


def check_identities(directory):
    """Section 11."""
    hashes = [section["hash"] for section in directory["sections"]]
    ranks, dense = [], []
    for tensor in directory["tensors"]:
        if tensor["kind"] == "clustered":
            entry = [tensor[key] for key in ("name", "shape", "k", "rows_per_table")]
            positions = hashes[tensor["exceptions"]["positions"]] if "exceptions" in tensor else b""
            ranks.append([*entry, [hashes[n] for n in tensor["planes"]], hashes[tensor["counts"]], positions])
        elif tensor["kind"] == "dense":
            dense.append([tensor["name"], tensor["shape"], tensor["dtype"], hashes[tensor["data"]]])
    need(directory["ranks_id"] == blake3(msgpack.packb(ranks)).digest(), "ranks_id")
    need(directory["dense_id"] == blake3(msgpack.packb(dense)).digest(), "dense_id")


def check_directory(kind, directory, end, program):
    """The directory, which begins at end, of a file of that kind (1 model, 2 values); program: whether bit 2 is set."""
    check_map(directory, DIRECTORY + " order:ascending|none" * (kind == 2), "directory")
    tensors, sections = directory["tensors"], directory["sections"]
    need(all(type(entry) is dict for entry in tensors + sections), "an entry is not a map")
    check_names([tensor.get("name") for tensor in tensors])
    for tensor in tensors:
        form = tensor.get("kind")
        need(form in (("clustered", "dense", "alias") if kind == 1 else ("values",)), f"tensor kind {form!r}")
        check_tensor(tensor)
    stored = {tensor["name"] for tensor in tensors if tensor["kind"] != "alias"}
    need(all(tensor["kind"] != "alias" or tensor["target"] in stored for tensor in tensors), "alias to no tensor")
    numbered = [own for tensor in tensors for own in tensor_sections(tensor)]
    need([number for number, _, _ in numbered] == list(range(len(numbered))), "section numbers")
    planned = [(section_kind, size) for _, section_kind, size in numbered]
    if size := values_bytes(tensors):
        planned.append(("values", size))
    blobs = [section.get("name") for section in sections[len(planned) :]]
    check_names(blobs)
    listed = ("chat_template.jinja", "tokenizer.json", *(strict_program.BLOBS if program else ()))
    known = (name in listed or name.startswith("x-") for name in blobs)
    need(all(known) and (kind == 1 or not blobs), f"blobs {blobs}")
    planned += [("blob", None)] * len(blobs)
    need(len(sections) == len(planned), f"{len(sections)} sections, not {len(planned)}")
    offset = 128
    for section, (section_kind, size) in zip(sections, planned, strict=True):
        check_section(section, section_kind, size, offset)
        offset = aligned(offset + section["length"])
    need(offset == end, f"the directory begins at {end}, not {offset}")
    if kind == 1:
        check_identities(directory)
        if program:
            strict_program.check_model(directory)


def check_frames(data, section):
    """Section 7: each chunk is one frame, as it has to be."""
    at, left = section["offset"], section["decoded_length"]
    for length in section["chunks"]:
        frame, size = data[at : at + length], min(left, CHUNK)
        try:
            header = zstandard.get_frame_parameters(frame)
            fits = header.content_size == size and header.dict_id == 0 and header.window_size <= 1 << 27
            need(fits, "frame", "integrity")
            decoder = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
            chunk = decoder.decompress(frame)
        except zstandard.ZstdError as error:
            raise Refused("integrity", f"frame: {error}") from error
        need(len(chunk) == size and decoder.eof and not decoder.unused_data, "frame", "integrity")
        at, left = at + length, left - CHUNK


def check_file(data):
    """Structure and frames of a file; gives its kind and directory."""
    kind = data[12] if len(data) >= 128 else 1
    try:
        directory = reference.open_directory(data, kind)
        containers, others = check_canonical(directory)
        need(containers <= 1 << 19 and others <= 1 << 22, "too many maps and arrays, or values")
        offset = int.from_bytes(data[32:40], "little")
        need(msgpack.packb(directory) == data[offset:], "another encoding")
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise Refused("structure", f"not canonical: {error}") from error
    check_directory(kind, directory, offset, bool(data[16] & 4))
    return kind, directory


def check_pair(model, other):
    """Section 12: the values are for these tensors."""
    need(all(model[key] == other[key] for key in ("ranks_id", "dense_id")), "other ranks or dense tensors", "binding")
    forms = [
        [[t["name"], t["shape"], t["k"], t["rows_per_table"], t.get("exceptions", {}).get("count")] for t in tensors]
        for tensors in ([t for t in model["tensors"] if t["kind"] == "clustered"], other["tensors"])
    ]
    need(forms[0] == forms[1], "other tensors", "binding")


def read(path, values=None):
    """As the reference reader, after every check: structure, frames, values, binding, and what is left to it."""
    files, directories = [strict_parts.whole(file) for file in (path, values) if file is not None], []
    for wanted, data in enumerate(files, 1):
        kind, directory = check_file(data)
        need(kind == wanted, f"not a file of kind {wanted}", "binding")
        directories.append(directory)
    for data, directory in zip(files, directories, strict=True):
        for section in directory["sections"]:
            if section["codec"] == "zstd":
                check_frames(data, section)
        reference.read_values(directory, data)
    if values is not None:
        check_pair(*directories)
    with tempfile.TemporaryDirectory() as folder:  # of a model in parts, the whole file
        paths = [Path(folder, str(number)) for number in range(len(files))]
        for place, data in zip(paths, files, strict=True):
            place.write_bytes(data)
        return reference.read(*paths)
