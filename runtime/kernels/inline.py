"""Declares the pieces of a kernel. They become part of a kernel's module (build.py) and are never called from Python.
So Numba stops at LLVM IR; machine code for every piece would take most of the compile time.
"""

from __future__ import annotations

from typing import Any

from numba import njit
from numba.core.codegen import CPUCodeLibrary
from numba.core.compiler import Compiler


class _IrLibrary(CPUCodeLibrary):
    """A function's module for linking into other modules; no engine compiles it."""

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
        # Callers identify a function by its Python entry point. Nothing calls it, so any method of a new object works.
        handle = [].append
        self.state.targetctx.insert_user_function(handle, compiled.fndesc, [compiled.library])
        return compiled._replace(entry_point=handle)


OPTIONS = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": _ToIr}
inline = njit(forceinline=True, **OPTIONS)
piece = njit(**OPTIONS)


@inline
def smaller(a, b):
    """min of two integers (Numba's whole pipeline would compile the builtin again each time)."""
    if a < b:
        return a
    return b


@inline
def larger(a, b):
    """max of two integers."""
    if a > b:
        return a
    return b
