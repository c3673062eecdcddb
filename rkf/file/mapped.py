"""Maps files for reading, and remembers the maps. Another process may cut a mapped file short, or its disk may fail.

The first access to a page that is gone then raises SIGBUS, which ends the process without a word. `replace_lost` puts
zeros in place of such pages, so that the access returns and the work can be ended in order (`rkf.commands.signals`).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np

from rkf.errors import ChangedError

_MAP_FIXED = 0x10  # on Linux and macOS alike

_maps: WeakKeyDictionary[mmap.mmap, Path] = WeakKeyDictionary()
_lost: list[Path] = []


def mapped(descriptor: int, path: Path, length: int = 0) -> mmap.mmap:
    """A file as a read-only map of so many bytes, by default all. Raises OSError, and ValueError for an empty file."""
    found = mmap.mmap(descriptor, length, access=mmap.ACCESS_READ)
    _maps[found] = path
    return found


def refuse_lost() -> None:
    """Raise ChangedError if zeros have taken the place of pages: nothing may be made of them."""
    if _lost:
        name = ", ".join(map(str, dict.fromkeys(_lost)))
        raise ChangedError(f"{name}: became shorter, or its disk failed, while it was open: restore it and start again")


def replace_lost() -> bool:
    """Put zeros in place of the pages of mapped files that are gone. False if there are no such files.

    These are the files that became shorter. If none did, a disk has failed: then all mapped files, whole.
    """
    live = [(each, path) for each, path in list(_maps.items()) if not each.closed]
    lost = [(each, path, each.size()) for each, path in live if each.size() < len(each)]
    for each, _, left in lost or [(each, path, 0) for each, path in live]:
        first = -(-left // mmap.PAGESIZE) * mmap.PAGESIZE
        if first < len(each):
            _put_zeros(each, first)
    _lost.extend(path for _, path, *_ in lost or live)
    return bool(live)


def _put_zeros(each: mmap.mmap, first: int) -> None:
    address = np.frombuffer(each, np.uint8).ctypes.data + first
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (*(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANON | _MAP_FIXED
    if libc.mmap(address, len(each) - first, mmap.PROT_READ, flags, -1, 0) != address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
