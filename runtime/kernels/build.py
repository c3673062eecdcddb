"""One kernel to an object file: Numba to LLVM IR, LLVM to machine code. Knows no cache."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
import numba
from numba import njit
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from rkf.runtime.kernels.inline import OPTIONS
from rkf.runtime.kernels.table import kernel


def build(name: str, level: str, symbol: str) -> bytes:
    """Compile a kernel of the table for a level of this CPU; the object exports it as `symbol`."""
    function, arguments = kernel(name, level)
    return emit(function, arguments, symbol, machine(level))


def emit(function: Callable[..., Any], arguments: tuple[Any, ...], symbol: str, machine: llvm.TargetMachine) -> bytes:
    """Compile a function for a machine; the object exports it as `symbol`, with the C calling convention.

    Kernels take only int64, return nothing and never raise, so the object needs neither Python nor Numba.
    """
    dispatcher = njit(**OPTIONS)(getattr(function, "py_func", function))
    with global_compiler_lock, _unoptimised():
        dispatcher.compile(arguments)
        compiled = dispatcher.overloads[arguments]
        compiled.library.finalize()
    module = llvm.parse_bitcode(compiled.library._final_module.as_bitcode())
    module.link_in(llvm.parse_assembly(_entry(symbol, compiled.fndesc.llvm_func_name, len(arguments))))
    for other in [*module.functions, *module.global_variables]:
        if not other.is_declaration and other.name != symbol:
            other.linkage = "internal"
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = True
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return machine.emit_object(module)


@contextmanager
def _unoptimised() -> Iterator[None]:
    """Turn off Numba's own optimisation, which would optimise every function by itself and again in each caller. Here
    all are optimised once, together.
    """
    cpu_target.target_context.codegen()  # creates Numba's machine, once per process, with the user's own level
    level, numba.config.OPT = numba.config.OPT, 0
    try:
        yield
    finally:
        numba.config.OPT = level


def _entry(symbol: str, target: str, arguments: int) -> str:
    """A C function that calls a function of Numba's convention: two leading out pointers (result, exception), a status
    returned.
    """
    values = ", ".join(f"i64 %a{i}" for i in range(arguments))
    return f"""
    declare i32 @"{target}"(ptr, ptr, {", ".join(["i64"] * arguments)})
    define void @{symbol}({values}) {{
        %result = alloca ptr
        %exception = alloca ptr
        %status = call i32 @"{target}"(ptr %result, ptr %exception, {values})
        ret void
    }}"""


def machine(level: str) -> llvm.TargetMachine:
    """The CPU to emit code for. A level forced below the host's must not use features that it lacks."""
    name, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    if platform.machine().lower() in ("x86_64", "amd64") and level != "avx512":
        name, features = {"avx2": "x86-64-v3", "portable": "x86-64"}[level], ""
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target.create_target_machine(name, features, opt=3, reloc="pic", codemodel="default")
