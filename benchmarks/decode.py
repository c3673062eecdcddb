"""Speed of rkf against llama.cpp and its forks, in turn: `python -m benchmarks.decode A.rkf=A.gguf … --peer PEER`.

PEER is a Python with llama-cpp-python, or a `llama-bench` binary with its options.

Speeds drift on a shared machine, so only ratios count. Each round runs one, then the other; the report gives the median
of the rounds' ratios with the smallest and the largest. It also gives the share of the ceiling, the speed of only
loading the planes (ceiling.py), and how a token's time is spent. The last line is everything as JSON; `--out` adds it
to a folder (benchmarks/results/), from which table.py makes the README's table.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import llvmlite.binding as llvm
import numpy as np

import rkf
from benchmarks.ceiling import Loader, planes
from benchmarks.peers import peer
from rkf.file.container import open_file
from rkf.runtime import cpu_features
from rkf.runtime.backend import Row
from rkf.runtime.cpu import CpuBackend
from rkf.runtime.kv_cache import FORMATS
from rkf.runtime.model import Model
from rkf.runtime.structs import PARTS

CONTEXT = 2560  # room for the longest case: 128 tokens after 2,048
CASES = ("prefill 512", "decode 128 0", "decode 128 2048")
ROUNDS_OF_PARTS = 8
TOKENS_OF_SHARE = 8


def ours(model: Model, case: str) -> float:
    """Seconds of one case; `peer_speed.py` times the same work."""
    what, count, *after = case.split()
    forward, sequence = model.backend.forward, model.backend.new_sequence(CONTEXT)
    before = np.arange(int(after[0]) if after else 0) % 1000 + 1
    if before.size:
        forward([Row(sequence, before)])
    began = perf_counter()
    if what == "prefill":
        forward([Row(sequence, np.arange(int(count)) % 1000 + 1)])
    else:
        token = np.ones(1, np.int64)
        for _ in range(int(count)):
            token = forward([Row(sequence, token)]).argmax(axis=1)
    return perf_counter() - began


def compare(a: Callable[[], float], b: Callable[[], float], rounds: int) -> dict[str, float]:
    """Seconds of a and b in turn after a warm-up of each; ratio: how many times faster a is."""
    a(), b()
    pairs = [(a(), b()) for _ in range(rounds)]
    ratios = [y / x for x, y in pairs]
    return {
        "rkf_s": median(x for x, _ in pairs),
        "peer_s": median(y for _, y in pairs),
        "ratio": median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def ceiling(model: Model, path: str, threads: int, loader: Loader) -> dict[str, float]:
    """The planes that a token reads, their rate, and the time to only load them as a share of a token's, in turn."""
    with open_file(path) as container:
        arrays = planes(container)
        case = f"decode {TOKENS_OF_SHARE} 0"
        pairs = [(loader.seconds(arrays, threads), ours(model, case) / TOKENS_OF_SHARE) for _ in range(ROUNDS_OF_PARTS)]
    size, token_s = sum(array.size for array in arrays), median(token for _, token in pairs)
    return {
        "plane_bytes": size,
        "planes_gb_s": size / token_s / 1e9,
        "load_only_s": median(load for load, _ in pairs),
        "share": median(load / token for load, token in pairs),
    }


def parts(backend: CpuBackend, context: int) -> dict[str, float]:
    """Microseconds of each part (structs.PARTS) of one token after `context` others; the median of several."""
    clock, sequence = backend.watch(), backend.new_sequence(CONTEXT)
    if context:
        backend.forward([Row(sequence, np.arange(context) % 1000 + 1)])
    token, found = np.ones(1, np.int64), []
    for _ in range(8 * ROUNDS_OF_PARTS):
        clock[1:] = 0
        began = perf_counter()
        token = backend.forward([Row(sequence, token)]).argmax(axis=1)
        found.append(clock[1:] / clock[1:].sum() * (perf_counter() - began) * 1e6)
    medians = np.median(found[1:], axis=0)
    return dict(zip(PARTS, np.round(medians, 1).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="+", metavar="MODEL.rkf=MODEL.gguf")
    parser.add_argument(
        "--peer", required=True, help="a Python that has llama-cpp-python, or a llama-bench binary and its options"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--kv-cache", choices=FORMATS, help="number format of rkf's key/value cache")
    parser.add_argument("--out", type=Path, help="a folder for a JSON file of each pair's results")
    options = parser.parse_args()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    loader = Loader()
    loop, plain = loader.check()
    print(f"load-only loop {loop / 1e9:.1f} GB/s over a large array on one thread, numpy's sum {plain / 1e9:.1f}")
    machine = {"rkf": rkf.__version__, "cpu": of_cpu("model name"), "cpu_class": cpu_class()}
    machine |= {"rounds": options.rounds, "load_only_gb_s": loop / 1e9}
    results = []
    for pair in options.pairs:
        path, gguf = pair.split("=")
        rows = [row for threads in options.threads for row in compared(path, gguf, threads, options, loader)]
        if options.out:
            name = f"{Path(path).stem}-{Path(gguf).stem}-{cpu_class()}.json".replace(", ", "-").replace(" ", "-")
            (options.out / name).write_text(json.dumps({**machine, "results": rows}, indent=1) + "\n")
        results += rows
    print(json.dumps({**machine, "results": results}))


def compared(
    path: str, gguf: str, threads: int, options: argparse.Namespace, loader: Loader
) -> Iterator[dict[str, Any]]:
    """All cases of a pair of files with this number of threads."""
    opponent = peer(options.peer, gguf, threads, CONTEXT)
    with rkf.load(path, threads=threads, kv_cache=options.kv_cache) as model:
        for case in options.cases:
            tokens = int(case.split()[1])
            row: dict[str, Any] = {"rkf": Path(path).stem, "peer": Path(gguf).stem, "threads": threads, "case": case}
            row |= {"rkf_bytes": Path(path).stat().st_size, "peer_bytes": Path(gguf).stat().st_size}
            row |= compare(partial(ours, model, case), partial(opponent.seconds, case), options.rounds)
            if case.startswith("decode"):
                row["parts_us"] = parts(model.backend, int(case.split()[2]))
            if case.endswith(" 0"):
                row |= ceiling(model, path, threads, loader)
            print(
                f"{row['rkf']} / {row['peer']}, {threads} threads, {case}: {tokens / row['rkf_s']:.0f} /"
                f" {tokens / row['peer_s']:.0f} tok/s, {row['ratio']:.2f} x"
                f" ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
                + (f", {row['share']:.0%} of the ceiling" if "share" in row else ""),
                flush=True,
            )
            yield row
    opponent.close()


def cpu_class() -> str:
    """The maker of the processor, AMD's generation, and the level of its kernels. Figures hold for one class."""
    name = llvm.get_host_cpu_name()
    amd = name.replace("znver", "AMD Zen ") if name.startswith("znver") else "AMD"
    makers = {"GenuineIntel": "Intel", "AuthenticAMD": amd}
    levels = {"avx512": "AVX-512", "avxvnni": "AVX-VNNI", "avx2": "AVX2", "neon": "NEON"}
    maker, level = of_cpu("vendor_id"), cpu_features.level()
    return f"{makers.get(maker, maker)}, {levels.get(level, level)}"


def of_cpu(key: str) -> str:
    """What Linux reports of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith(key)), platform.processor())


if __name__ == "__main__":
    main()
