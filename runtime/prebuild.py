"""Compiles every kernel for the platforms that a wheel serves, into this package. `make wheel` runs it first.

A build without this step makes a working wheel too: its kernels are compiled at a user's first start.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import llvmlite.binding as llvm

from rkf.format.codec import workers
from rkf.runtime import objects
from rkf.runtime.jit import SYMBOL

PLATFORMS = {
    "x86_64-unknown-linux-gnu": ("avx512", "avxvnni", "avx2", "portable"),
    "aarch64-unknown-linux-gnu": ("neon",),
}


def prebuild(level: str, triple: str, names: Iterable[str] | None = None) -> int:
    """Compile kernels (default: all of them) for a CPU level of a platform, except those that are there. Returns the
    bytes of all of them.
    """
    from rkf.runtime.kernels import build, table

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    folder, size = objects.shipped(level, triple), 0
    for name in table.names(level) if names is None else names:
        code = objects.read(folder, name)
        if code is None:
            code = build.build(name, level, SYMBOL, triple)
            objects.write(folder, name, code)
        size += len(code)
    return size


def main() -> None:
    targets = [(level, triple) for triple, levels in PLATFORMS.items() for level in levels]
    folders = {objects.shipped(level, triple) for level, triple in targets}
    for other in objects.PREBUILT.glob("*"):
        if other not in folders:
            shutil.rmtree(other)  # of earlier sources
    with ProcessPoolExecutor(workers(), get_context("spawn")) as pool:
        sizes = pool.map(prebuild, *zip(*targets, strict=True))
        for (level, triple), size in zip(targets, sizes, strict=True):
            print(f"{triple} {level}: {size:,} bytes of kernels")


if __name__ == "__main__":
    main()
