"""Compiled kernels by name: from this package's wheel, from the user's cache, or compiled now and kept there.

Numba compiles a kernel to one relocatable object without references to Python or Numba. So a start that finds its
objects links them with llvmlite alone: no numba import, no type inference. If the cache cannot be written, kernels
that the wheel lacks are compiled at every start.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any, NamedTuple

import llvmlite.binding as llvm

from rkf.cache import cache_dir
from rkf.runtime import cpu_features, objects

SYMBOL = "rkf_kernel"  # the name under which every object exports its kernel


def addresses(names: Iterable[str], level: str) -> dict[str, int]:
    """The addresses of kernels (kernels/table.py lists them) for a CPU level; newly compiled ones are kept for the
    next start.
    """
    found = {name: _stored(name, level) for name in dict.fromkeys(names)}
    missing = [name for name, code in found.items() if code is None]
    if missing:
        found |= _compile(missing, level)
    return {name: _link(name, level, code) for name, code in found.items() if code is not None}


def _stored(name: str, level: str) -> bytes | None:
    code = objects.read(objects.shipped(level), name)
    return code if code is not None else objects.read(objects.kept(level), name)


@cache
def _say_not_kept(folder: Path) -> None:
    """Warn once per process: a cache that cannot be written is not an error."""
    print(f"rkf: {folder} cannot be written, so every start compiles again; set RKF_CACHE", file=sys.stderr)


def _compile(names: list[str], level: str) -> Mapping[str, bytes]:
    print(f"rkf: compiling {len(names)} kernels for this CPU ({level}), once; this takes some seconds", file=sys.stderr)
    from rkf.runtime.kernels.build import build

    compiled = {}
    for name in names:
        compiled[name] = build(name, level, SYMBOL)
        try:
            objects.write(objects.kept(level), name, compiled[name])
        except OSError:
            _say_not_kept(cache_dir())
    return compiled


class Warmth(NamedTuple):
    """The result of `warm_up`. folder: where compiled kernels are kept."""

    level: str
    kernels: int
    compiled: int
    seconds: float
    folder: Path


def warm_up(progress: Callable[[int, int], None] = lambda done, total: None) -> Warmth:
    """Compile every kernel of this CPU's level that neither the wheel nor the cache has, so that later starts need not.

    progress: called with (done, total) kernels. Raises OSError if the cache cannot be written.
    """
    from rkf.runtime.kernels.build import build
    from rkf.runtime.kernels.table import names

    began, level = perf_counter(), cpu_features.level()
    folder, every = objects.kept(level), names(level)
    missing = [name for name in every if _stored(name, level) is None]
    for done, name in enumerate(missing):
        progress(done, len(missing))
        objects.write(folder, name, build(name, level, SYMBOL))
    return Warmth(level, len(every), len(missing), perf_counter() - began, folder)


@cache
def _linker() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    # JITLink puts all sections of an object into one piece of memory. LLVM's older linker takes a piece for each. With
    # a large file mapped between them, 32-bit offsets do not reach, and it aborts the process: on every first start
    # with a file of 2.5 GB, and on one warm start in eight.
    return llvm.create_lljit_compiler(use_jit_link=True)


_linked: dict[tuple[str, str], Any] = {}
_linking = Lock()  # several threads may load models at once, and all of them link here


def _link(name: str, level: str, code: bytes) -> int:
    """The address of an object's kernel; it stays linked for the life of the process."""
    key = (name, level)
    with _linking:
        if key not in _linked:
            builder = llvm.JITLibraryBuilder().add_object_img(code).export_symbol(SYMBOL).add_current_process()
            _linked[key] = builder.link(_linker(), f"{level}_{name}")
    return _linked[key][SYMBOL]
