"""One kernel to an object file: Numba to LLVM IR, LLVM to machine code. Knows no cache.

The code depends on the CPU level and on the platform, not on the CPU at hand, so that wheels can carry it.
"""

from __future__ import annotations

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

# What LLVM may use at each level, by architecture: a CPU model and features on top of it. cpu_features.py checks that
# the host has all of them.
_CPUS = {
    ("x86_64", "avx512"): ("x86-64-v4", "+avx512vbmi,+avx512vnni"),
    ("x86_64", "avxvnni"): ("x86-64-v3", "+avxvnni"),
    ("x86_64", "avx2"): ("x86-64-v3", ""),
    ("x86_64", "portable"): ("x86-64", ""),
    ("aarch64", "neon"): ("generic", "+dotprod"),
}


def build(name: str, level: str, symbol: str, triple: str | None = None) -> bytes:
    """Compile a kernel of the table for a CPU level; the object exports it as `symbol`. triple: as in `machine`."""
    function, arguments = kernel(name, level)
    return emit(function, arguments, symbol, machine(level, triple))


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
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    module.link_in(llvm.parse_assembly(_platform_functions(machine.triple)))
    module.link_in(llvm.parse_assembly(_entry(symbol, compiled.fndesc.llvm_func_name, len(arguments))))
    others = [part for part in [*module.functions, *module.global_variables] if not part.is_declaration]
    for number, other in enumerate(part for part in others if part.name != symbol):
        # Numba's names count the functions compiled so far. The same kernel must give the same bytes.
        other.name, other.linkage = f"{symbol}_{number}", "internal"
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


def _platform_functions(triple: str) -> str:
    """Definitions of rkf_pause (nothing, where LLVM has no hint), rkf_ticks and rkf_give_way."""
    architecture = _architecture(triple)
    pause = {
        "x86_64": "call void @llvm.x86.sse2.pause()",
        "aarch64": "call void @llvm.aarch64.hint(i32 1)",
    }.get(architecture, "")
    counter = "steady" if architecture == "aarch64" else "cycle"
    give_way = "SwitchToThread" if "windows" in triple else "sched_yield"
    return f"""
    declare void @llvm.x86.sse2.pause()
    declare void @llvm.aarch64.hint(i32)
    declare i64 @llvm.read{counter}counter()
    declare i32 @{give_way}()
    define void @rkf_pause() {{
        {pause}
        ret void
    }}
    define i64 @rkf_ticks() {{
        %now = call i64 @llvm.read{counter}counter()
        ret i64 %now
    }}
    define void @rkf_give_way() {{
        %unused = call i32 @{give_way}()
        ret void
    }}"""


def machine(level: str, triple: str | None = None) -> llvm.TargetMachine:
    """The machine to emit code for. triple: LLVM's name of a platform; this one by default."""
    triple = triple or llvm.get_process_triple()
    cpu, features = _CPUS.get((_architecture(triple), level), ("generic", ""))
    target = llvm.Target.from_triple(triple)
    return target.create_target_machine(cpu, features, opt=3, reloc="pic", codemodel="default")


def _architecture(triple: str) -> str:
    """LLVM's name of an architecture; Apple's is another for the same."""
    name = triple.partition("-")[0]
    return "aarch64" if name == "arm64" else name
