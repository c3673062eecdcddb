"""Compiled kernels by name: from the user's cache, or compiled now and stored there.

Numba compiles a kernel to one relocatable object without references to Python or Numba. So a warm start links it with
llvmlite alone: no numba import, no type inference. A hash of everything that the code depends on names the cache's
folder. Files appear there by rename, so several processes may start at once. If the folder cannot be written, kernels
are compiled at every start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import Lock, get_ident
from time import perf_counter
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from blake3 import blake3

from rkf.cache import cache_dir
from rkf.runtime import cpu_features

_SYMBOL = "rkf_kernel"
_DIGEST_BYTES = 32


def addresses(names: Iterable[str], level: str) -> dict[str, int]:
    """The addresses of kernels (kernels/table.py lists them) for a CPU level; newly compiled ones are kept for the
    next start.
    """
    folder = _folder(level)
    objects = {name: _cached(_file(folder, name)) for name in dict.fromkeys(names)}
    missing = [name for name, code in objects.items() if code is None]
    if missing:
        objects |= _compile(missing, level, folder)
    return {name: _link(name, level, code) for name, code in objects.items() if code is not None}


@cache
def _folder(level: str) -> Path:
    """The folder of objects for this code, this CPU and these compilers."""
    here = Path(__file__).parent
    digest = blake3()
    for source in [here / "structs.py", *sorted((here / "kernels").glob("*.py"))]:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    target = (level, llvm.get_host_cpu_name(), llvm.get_process_triple(), *sorted(cpu_features.host_features()))
    digest.update(repr((target, version("numba"), version("llvmlite"))).encode())
    return cache_dir() / "kernels" / digest.hexdigest()[:32]


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(':', '-')}.o"


def _cached(path: Path) -> bytes | None:
    """A stored object, or None if it is missing or incomplete."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    digest, code = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    return code if blake3(code).digest() == digest else None


def _keep(path: Path, code: bytes) -> None:
    """Store an object. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = path.with_name(f"{path.name}.{os.getpid()}-{get_ident()}")
    try:
        waiting.write_bytes(blake3(code).digest() + code)
        waiting.replace(path)
    finally:
        waiting.unlink(missing_ok=True)


@cache
def _say_not_kept(folder: Path) -> None:
    """Warn once per process: a cache that cannot be written is not an error."""
    print(f"rkf: {folder} cannot be written, so every start compiles again; set RKF_CACHE", file=sys.stderr)


def _compile(names: list[str], level: str, folder: Path) -> Mapping[str, bytes]:
    print(f"rkf: compiling {len(names)} kernels for this CPU ({level}), once; this takes some seconds", file=sys.stderr)
    from rkf.runtime.kernels.build import build

    objects = {}
    for name in names:
        objects[name] = build(name, level, _SYMBOL)
        try:
            _keep(_file(folder, name), objects[name])
        except OSError:
            _say_not_kept(cache_dir())
    return objects


class Warmth(NamedTuple):
    """The result of `warm_up`."""

    level: str
    kernels: int
    compiled: int
    seconds: float
    folder: Path


def warm_up(progress: Callable[[int, int], None] = lambda done, total: None) -> Warmth:
    """Compile every kernel of this CPU's level that is not in the cache yet, so that later starts need not.

    progress: called with (done, total) kernels. Raises OSError if the cache cannot be written.
    """
    from rkf.runtime.kernels.build import build
    from rkf.runtime.kernels.table import names

    began, level = perf_counter(), cpu_features.level()
    folder, every = _folder(level), names(level)
    missing = [name for name in every if _cached(_file(folder, name)) is None]
    for done, name in enumerate(missing):
        progress(done, len(missing))
        _keep(_file(folder, name), build(name, level, _SYMBOL))
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
            builder = llvm.JITLibraryBuilder().add_object_img(code).export_symbol(_SYMBOL).add_current_process()
            _linked[key] = builder.link(_linker(), f"{level}_{name}")
    return _linked[key][_SYMBOL]
