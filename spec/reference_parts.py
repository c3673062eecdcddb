"""Puts the parts of a model together, from parts.md and rkf-1.md alone: `join(path)` -> the bytes of the whole file.

Of a whole file these are its own. Plain on purpose; it raises `Refused(level, detail)` as reference_reader.py does.
"""

import struct
from pathlib import Path

import msgpack
from blake3 import blake3
from reference_reader import aligned, need, open_directory

HEAD = "<8sHHIQQQQQ32sQ"


def join(path):
    """Sections 2 to 4."""
    path = Path(path)
    data = path.read_bytes()
    index = open_directory(data, 1, features=5)
    block = list(struct.unpack(HEAD, data[:96]))
    need(("parts" in index) == block[4] & 1, "bit 0 and `parts`")
    if not block[4] & 1:
        return data
    parts, sections = index.pop("parts"), index["sections"]
    need(block[6] == 128 and type(parts) is list and 1 <= len(parts) <= 99999, "an index with its parts")
    whole, first, stem = bytes(128), 0, path.name.removesuffix(".rkf")
    for number, part in enumerate(parts, 1):
        need(all(type(part.get(key)) is int for key in ("length", "sections")) and part["sections"] > 0, "an entry")
        held = sections[first : first + part["sections"]]
        need(len(held) == part["sections"], f"part {number} has more sections than are left")
        whole += body(path.with_name(f"{stem}-{number:05}-of-{len(parts):05}.rkf"), number, part, held)
        first += len(held)
    need(first == len(sections), "sections in no part")
    directory = msgpack.packb(index)
    block[4], block[6:9] = block[4] & ~1, [len(whole), len(directory), len(whole) + len(directory)]
    block[9] = blake3(directory).digest()
    head = struct.pack(HEAD, *block)
    return head + blake3(head).digest() + whole[128:] + directory


def body(path, number, part, held):
    """The bytes of a part before its directory, checked to be those of its entry in the index."""
    need(path.is_file(), f"{path.name} is missing")
    data = path.read_bytes()
    need(data[12:13] not in (b"\1", b"\2"), f"{path.name} is no part")
    directory = open_directory(data, 3, features=1)
    offset = int.from_bytes(data[32:40], "little")
    need(data[56:88] == part["directory_hash"] and len(data) == part["length"], f"{path.name} is another part")
    need(directory["number"] == number, f"{path.name} has another number")
    distance = held[0]["offset"] - 128
    moved = [{**listed(section), "offset": section["offset"] - distance} for section in held]
    need([listed(section) for section in directory["sections"]] == moved, f"{path.name} has other sections")
    need(offset == aligned(moved[-1]["offset"] + moved[-1]["length"]), f"{path.name}: its directory's place")
    return data[128:offset]


def listed(section):
    return {key: value for key, value in section.items() if not key.startswith("x-")}
