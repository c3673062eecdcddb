"""Kept files of arrays (numpy's npz, no pickles): written with a version and a hash, read back with every check.

Each file has one more array, `kept`, of two texts: its kind with a version, and a BLAKE3 over the other arrays. A
reader says which names, dtypes and numbers of axes it expects. Sizes come from the arrays' headers and are held against
the zip's and against a limit before anything is allocated. Knows no contents.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.lib import format as npy
from numpy.typing import NDArray

MAGIC = b"PK\x03\x04"  # first bytes of the file
MOST = 1 << 29  # bytes of all arrays together
_HEADER = 10_000  # bytes; numpy's own limit for headers that nobody vouches for
_KEPT = "kept"

Arrays = Mapping[str, NDArray[Any]]


def packed_arrays(kind: str, arrays: Arrays) -> memoryview:
    """The bytes of a kept file. kind: what it is and the version of its form, as "calibration 1"."""
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    packed = io.BytesIO()
    np.savez(packed, **{_KEPT: np.array([kind, _digest(whole)]), **whole})  # type: ignore[arg-type]
    return packed.getbuffer()


def read_arrays(
    data: bytes, kind: str, expected: Mapping[str, tuple[str, int]], most: int = MOST
) -> dict[str, NDArray[Any]]:
    """The arrays of a kept file. expected: name -> dtype, as "f8", and number of axes; "U" is text of any length. most:
    bytes of all arrays together.

    Raises ValueError, in one line, for whatever is not exactly that.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if len(members) != len(archive.infolist()):
                raise ValueError("expected each array once")
            if sum(info.file_size for info in members.values()) > most:
                raise ValueError(f"expected at most {most} bytes of arrays")
            found, digest = _label(archive, members)
            if found != kind:
                raise ValueError(f"expected {kind}, got {found!r}: write it again with this version of rkf")
            if set(members) != {f"{name}.npy" for name in (_KEPT, *expected)}:
                raise ValueError(f"expected the arrays {', '.join(expected)}")
            arrays = {name: _array(archive, members[f"{name}.npy"], name, *form) for name, form in expected.items()}
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if _digest(arrays) != digest:
        raise ValueError("damaged: the arrays do not match their hash")
    return arrays


def _label(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> tuple[str, str]:
    """The kind of the file, and the hash of its arrays."""
    if f"{_KEPT}.npy" not in members:
        raise ValueError("another zip, or one by an early version of rkf: it has no array `kept`")
    label = _array(archive, members[f"{_KEPT}.npy"], _KEPT, "U", 1).tolist()
    if len(label) != 2:
        raise ValueError(f"{_KEPT}: expected a version and a hash")
    return label[0], label[1]


def _digest(arrays: Arrays) -> str:
    digest = blake3()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, dtype: str, axes: int) -> NDArray[Any]:
    with archive.open(info) as file:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, found = read(file, max_header_size=_HEADER)
        fits = found.kind == "U" if dtype == "U" else found == np.dtype(f"<{dtype}")
        if not fits or len(shape) != axes or fortran:
            raise ValueError(f"{name}: expected {dtype} with {axes} axes, got {found} {shape}")
        size = math.prod(shape) * found.itemsize
        if size > info.file_size:
            raise ValueError(f"{name}: cut short")
        array = np.frombuffer(file.read(size), found, math.prod(shape)).reshape(shape)
        if dtype == "U":
            array.tolist()  # raises ValueError for code points that are none
        return array
