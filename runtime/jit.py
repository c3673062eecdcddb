"""Compiled kernels by name: from this package's wheel, from the user's cache, or compiled now and kept there.

Numba compiles a kernel to one relocatable object without references to Python or Numba. So a start that finds its
objects links them with llvmlite alone: no numba import, no type inference. If the cache cannot be written, kernels
that the wheel lacks are compiled at every start.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from blake3 import blake3

from rkf.cache import cache_dir
from rkf.errors import OutputError
from rkf.runtime import cpu_features, objects

SYMBOL = "rkf_kernel"  # the name under which every object exports its kernel


def addresses(names: Iterable[str], level: str) -> dict[str, int]:
    """The addresses of kernels (kernels/table.py lists them) for a CPU level; newly compiled ones are kept for the
    next start.
    """
    wanted = list(dict.fromkeys(names))
    found = {name: address for name in wanted if (address := _stored(name, level)) is not None}
    missing = [name for name in wanted if name not in found]
    if missing:
        found |= {name: _link(name, level, code) for name, code in _compile(missing, level).items()}
    return {name: found[name] for name in wanted}


def _stored(name: str, level: str) -> int | None:
    """The address of a kernel that the wheel or the cache has; None if neither has one that can be linked."""
    for folder in (objects.shipped(level), _kept(level)):
        code = None if folder is None else objects.read(folder, name)
        if code is not None:
            with suppress(RuntimeError):  # it is no object: compiled again, it takes the place of this one
                return _link(name, level, code)
    return None


def _kept(level: str) -> Path | None:
    """The folder of the objects in the cache; None for a user who has no place for one."""
    try:
        return objects.kept(level)
    except OutputError:
        return None


@cache
def _say_not_kept() -> None:
    """Warn once per process: a cache that cannot be written is not an error."""
    try:
        problem = f"{cache_dir()} cannot be written"
    except OutputError:
        problem = "there is no home folder"
    print(f"rkf: {problem}, so every start compiles again; set RKF_CACHE", file=sys.stderr)


def _compile(names: list[str], level: str) -> Mapping[str, bytes]:
    print(f"rkf: compiling {len(names)} kernels for this CPU ({level}), once; this takes some seconds", file=sys.stderr)
    from rkf.runtime.kernels.build import build

    compiled = {}
    for name in names:
        compiled[name] = build(name, level, SYMBOL)
        try:
            objects.write(objects.kept(level), name, compiled[name])
        except OutputError:
            _say_not_kept()
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

    progress: called with (done, total) kernels. Raises OutputError if the cache cannot be written.
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
            _linked[key] = builder.link(_linker(), f"{level}_{name}_{blake3(code).hexdigest()}")
    return _linked[key][SYMBOL]
