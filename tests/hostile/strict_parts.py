"""Models in parts for the strict reader: what spec/reference_parts.py leaves out of parts.md, the keys of maps and the
canonical form.
"""

from pathlib import Path

import msgpack

from tests.hostile import strict
from tests.spec import reference
from tests.spec.reference import Refused, need

ENTRY = "directory_hash:hash length:uint sections:uint"
PART = "number:uint sections:list"


def whole(path):
    """The bytes of a file; of a model in parts, those of the whole file, after every check of parts.md."""
    path = Path(path)
    data = path.read_bytes()
    if len(data) < 128 or not data[16] & 1:
        return data
    try:
        index = canonical(data, reference.open_directory(data, 1, features=5))
        need(type(index.get("parts")) is list, "parts")
        for number, entry in enumerate(index["parts"]):
            strict.check_map(entry, ENTRY, f"part {number}")
        joined = reference.join(path)
        stem, count = path.name.removesuffix(".rkf"), len(index["parts"])
        for number in range(1, count + 1):
            part = path.with_name(f"{stem}-{number:05}-of-{count:05}.rkf").read_bytes()
            strict.check_map(canonical(part, reference.open_directory(part, 3, features=1)), PART, f"part {number}")
        return joined
    except (ValueError, TypeError, AttributeError, KeyError, msgpack.UnpackException) as error:
        raise Refused("structure", f"{type(error).__name__}: {error}") from error


def canonical(data, directory):
    """The directory of a file, if its bytes are canonical."""
    containers, others = strict.check_canonical(directory)
    need(containers <= 1 << 19 and others <= 1 << 22, "too many maps and arrays, or values")
    need(msgpack.packb(directory) == data[int.from_bytes(data[32:40], "little") :], "another encoding")
    return directory
