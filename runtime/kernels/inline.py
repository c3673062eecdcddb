"""How the pieces of a kernel are declared. They exist to become part of a kernel's module (build.py), never to be
called from Python, so Numba is told to stop at LLVM IR: machine code for every piece would take most of the time.
"""

from __future__ import annotations

from typing import Any

from numba import njit
from numba.core.codegen import CPUCodeLibrary
from numba.core.compiler import Compiler


class _IrLibrary(CPUCodeLibrary):
    """A function's module that other modules link, and no engine compiles."""

    def _finalize_final_module(self) -> None:
        self._finalized = True


class _ToIr(Compiler):
    """Numba's pipeline without its last step."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.state.flags.no_compile = True
        self.state.library = _IrLibrary(self.state.targetctx.codegen(), "rkf")

    def compile_extra(self, function: Any) -> Any:
        compiled = super().compile_extra(function)
        # Callers know a function by what Python would call; nobody calls, so any method of a new object will do.
        handle = [].append
        self.state.targetctx.insert_user_function(handle, compiled.fndesc, [compiled.library])
        return compiled._replace(entry_point=handle)


OPTIONS = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": _ToIr}
inline = njit(forceinline=True, **OPTIONS)
piece = njit(**OPTIONS)


@inline
def smaller(a, b):
    """min of two integers (the builtin would be compiled by Numba's whole pipeline, each time)."""
    if a < b:
        return a
    return b


@inline
def larger(a, b):
    """max of two integers."""
    if a > b:
        return a
    return b
