"""The features of this CPU, read once through CPUID (by LLVM), and the family of kernels to use. Executes no vector
instruction.
"""

from __future__ import annotations

import os
from functools import cache

from rkf.errors import UsageError

# The features that each level's kernels may use (kernels/build.py): those of x86-64-v3 at avx2, one more at avxvnni,
# those of x86-64-v4 and two more at avx512. LLVM reports a feature only if the operating system saves its registers.
_V3 = {"avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe"}
LEVELS = {
    "avx512": {*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512vbmi", "avx512vnni"},
    "avxvnni": {*_V3, "avxvnni"},
    "avx2": _V3,
    "neon": {"neon", "dotprod"},
    "portable": set(),
}


@cache
def host_features() -> frozenset[str]:
    """The names of the features that LLVM finds; empty if it cannot tell (then everything is portable)."""
    import llvmlite.binding as llvm  # 100 ms, which `rkf info` need not wait

    return frozenset(name for name, there in llvm.get_host_cpu_features().items() if there)


@cache
def _zen() -> str | None:
    """The generation of a Zen CPU: "4", for one."""
    import llvmlite.binding as llvm

    name = llvm.get_host_cpu_name()
    return name.removeprefix("znver") if name.startswith("znver") else None


def prefetches_far(level: str | None) -> bool:
    """Whether products of one token prefetch into the second-level cache alone. On Zen 4 this lets a core have more
    reads of memory under way, but on AVX2 arithmetic is the limit. Zen 5 is faster with both caches.
    """
    return level == "avx512" and _zen() == "4"


def prefetch_bytes(level: str | None) -> int:
    """How far ahead of its reads each of a product's streams prefetches. Without any, reading planes from the outer
    caches or from memory takes half as long again (docs/log.md). level: of the products; None: exact ones.
    """
    if prefetches_far(level):
        return 1536
    if level == "avx512" and _zen() == "5":
        return 768
    return 640 if _zen() is None else 384


def level() -> str:
    """The best level of this CPU, or the one that RKF_CPU selects."""
    wanted = os.environ.get("RKF_CPU")
    if wanted is None:
        return next(name for name, needs in LEVELS.items() if needs <= host_features())
    if wanted not in LEVELS:
        raise UsageError(f"RKF_CPU={wanted}: expected one of {', '.join(LEVELS)}")
    missing = LEVELS[wanted] - host_features()
    if missing:
        raise UsageError(f"RKF_CPU={wanted}: this CPU lacks {', '.join(sorted(missing))}; unset it or choose portable")
    return wanted
