"""Reads kept files of arrays (numpy's npz) from bytes that nobody vouches for. Knows no contents.

What is in them is told first: the names, dtypes and numbers of axes. Sizes come from the arrays' headers and are held
against the zip's and against a limit before anything is allocated.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

MOST = 1 << 29  # bytes of all arrays together
_HEADER = 10_000  # bytes; numpy's own limit for headers that nobody vouches for


def read_arrays(data: bytes, expected: Mapping[str, tuple[str, int]]) -> dict[str, NDArray[Any]]:
    """The arrays of a zip. expected: name -> dtype, as "f8", and number of axes; "U" is text of any length.

    Raises ValueError, in one line, for whatever is not exactly that.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if len(members) != len(archive.infolist()) or set(members) != {f"{name}.npy" for name in expected}:
                raise ValueError(f"expected the arrays {', '.join(expected)}")
            if sum(info.file_size for info in members.values()) > MOST:
                raise ValueError(f"expected at most {MOST} bytes of arrays")
            return {name: _array(archive, members[f"{name}.npy"], name, *form) for name, form in expected.items()}
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, zlib.error) as error:
        raise ValueError(str(error) or type(error).__name__) from error


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
        return np.frombuffer(file.read(size), found, math.prod(shape)).reshape(shape)
