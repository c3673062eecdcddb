"""Compiled kernels as files: those that a wheel carries, and those in the user's cache. Knows no compiler.

The name of a folder is a hash of everything that its objects depend on, so an object of other sources, of another level
or for another platform is never found. A file is a digest and the object.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

import llvmlite.binding as llvm
from blake3 import blake3

from rkf.cache import cache_dir
from rkf.errors import BusyError, OutputError
from rkf.file.atomic import replacing
from rkf.file.private import private_folder, read_private

_HERE = Path(__file__).parent
PREBUILT = _HERE / "prebuilt"
_DIGEST_BYTES = 32
_MOST = 1 << 24  # bytes of an object; the largest take 200 kB


def edition() -> str:
    """A hash of the sources of all kernels: what they compute is the same if this is."""
    return _digest()


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
    """A stored object, or None if it is missing, damaged, or not surely this user's. Objects of the package itself are
    as trustworthy as its code.
    """
    path, stored = _file(folder, name), None
    if _is_shipped(folder):
        stored = path.read_bytes() if path.is_file() else None
    elif _is_trusted(folder):
        stored = read_private(path, _MOST)
    if stored is None:
        return None
    digest, code = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    return code if blake3(code).digest() == digest else None


def write(folder: Path, name: str, code: bytes) -> None:
    """Store an object; several processes may start at once. Raises OutputError."""
    private = not _is_shipped(folder)
    if private:
        private_folder(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
    with suppress(BusyError), replacing(_file(folder, name), force=True, private=private) as file:
        file.write(blake3(code).digest() + code)


def _is_shipped(folder: Path) -> bool:
    return folder.parent == PREBUILT


@cache
def _is_trusted(folder: Path) -> bool:
    """Whether nobody else can have written to the folder of kept objects."""
    try:
        private_folder(folder)
    except OutputError:
        return False
    return True


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
