"""Compiled kernels as files: those that a wheel carries, and those in the user's cache. Knows no compiler.

The name of a folder is a hash of everything that its objects depend on, so an object of other sources, of another level
or for another platform is never found. A file is a digest and the object.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import get_ident

import llvmlite.binding as llvm
from blake3 import blake3

from rkf.cache import cache_dir

_HERE = Path(__file__).parent
PREBUILT = _HERE / "prebuilt"
_DIGEST_BYTES = 32


def shipped(level: str, triple: str | None = None) -> Path:
    """The folder of the objects that came with this package, for a CPU level; triple: the target, by default this host.

    Its name does not depend on the installed Numba and llvmlite: an object needs only a linker, and any will do.
    """
    triple = triple or llvm.get_process_triple()
    return PREBUILT / f"{_platform(triple)}-{level}-{_digest(level, _platform(triple))}"


def kept(level: str) -> Path:
    """The folder of the objects that this user's compilers made for a CPU level of this host."""
    return cache_dir() / "kernels" / _digest(level, _platform(llvm.get_process_triple()), *_compilers())


def read(folder: Path, name: str) -> bytes | None:
    """A stored object, or None if it is missing or damaged."""
    try:
        stored = _file(folder, name).read_bytes()
    except OSError:
        return None
    digest, code = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    return code if blake3(code).digest() == digest else None


def write(folder: Path, name: str, code: bytes) -> None:
    """Store an object. It appears by rename, so several processes may start at once. Raises OSError."""
    path = _file(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    waiting = path.with_name(f"{path.name}.{os.getpid()}-{get_ident()}")
    try:
        waiting.write_bytes(blake3(code).digest() + code)
        waiting.replace(path)
    finally:
        waiting.unlink(missing_ok=True)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(':', '-')}.o"


@cache
def _compilers() -> tuple[str, str]:
    return version("numba"), version("llvmlite")  # a quarter of a millisecond each: asked once, not per kernel


@cache
def _digest(*parts: str) -> str:
    """A hash of the sources of all kernels and of `parts`."""
    digest = blake3()
    for source in [_HERE / "structs.py", *sorted((_HERE / "kernels").glob("*.py"))]:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    digest.update(repr(parts).encode())
    return digest.hexdigest()[:32]


def _platform(triple: str) -> str:
    """Architecture and system: what LLVM's triple says of an object's instructions, format and calling convention."""
    system = next((name for name in ("linux", "windows", "darwin") if name in triple), "other")
    return f"{triple.partition('-')[0]}-{system}"
