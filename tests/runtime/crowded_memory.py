"""Links a kernel where the only free memory around a mapping of 2.5 GB is single pages before its end, and plenty far
below: a linker that places each section of an object by itself puts them too far apart for 32-bit offsets, and aborts.
"""

import ctypes
import mmap

import numpy as np

from rkf.runtime import cpu_features, jit

LARGE = 5 << 29
RESERVED = 0x4000  # MAP_NORESERVE: nothing is stored, so it costs no memory
KERNEL = "attend:many:int16"  # code of two pages, constants of less than one

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | RESERVED

if __name__ == "__main__":
    level = cpu_features.level()
    jit.addresses(["publish"], level)  # the linker has its own memory by now
    file = np.frombuffer(mmap.mmap(-1, LARGE, flags=FLAGS, prot=mmap.PROT_READ), np.uint8).ctypes.data
    size = 1 << 32
    while size > mmap.PAGESIZE:  # fill what is free above it
        at = libc.mmap(None, size, 0, FLAGS, -1, 0)
        if at < file:
            libc.munmap(at, size)
            size //= 2
    for page in range(2, 400, 2):
        libc.munmap(file + LARGE - page * mmap.PAGESIZE, mmap.PAGESIZE)
    jit.addresses([KERNEL], level)
