"""Speed of rkf against llama.cpp, in turn: `python -m benchmarks.decode A.rkf=A.gguf … --peer PYTHON`.

Shared machines drift, so only ratios count: each round runs the one, then the other, and the median of the rounds'
ratios is what is reported, with the least and the greatest. The last line is all of it as JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

import rkf
from rkf.runtime.model import Model

PEER = Path(__file__).with_name("peer_speed.py")
CONTEXT = 2560  # room for the longest case: 128 tokens after 2,048
CASES = ("prefill 512", "decode 128 0", "decode 128 2048")


class Peer:
    """llama.cpp in a process of its own, one model loaded."""

    def __init__(self, python: str, model: str, threads: int) -> None:
        command = [python, str(PEER), model, str(threads), str(CONTEXT)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._line()

    def seconds(self, case: str) -> float:
        """Run one case."""
        self._process.stdin.write(case + "\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _line(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args}: ended before it answered")
        return line


def ours(model: Model, case: str) -> float:
    """Seconds of one case; what is timed is what `peer_speed.py` times."""
    what, count, *after = case.split()
    forward, cache = model.backend.forward, model.backend.new_cache(CONTEXT)
    before = np.arange(int(after[0]) if after else 0) % 1000 + 1
    if before.size:
        forward(before, cache, last_only=True)
    began = perf_counter()
    if what == "prefill":
        forward(np.arange(int(count)) % 1000 + 1, cache, last_only=True)
    else:
        token = np.ones(1, np.int64)
        for _ in range(int(count)):
            token = forward(token, cache, last_only=True).argmax(axis=1)
    return perf_counter() - began


def compare(a: Callable[[], float], b: Callable[[], float], rounds: int) -> dict[str, float]:
    """Seconds of a and b in turn after a warm-up of each; ratio: how many times as fast a is."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="+", metavar="MODEL.rkf=MODEL.gguf")
    parser.add_argument("--peer", required=True, help="a python that has llama-cpp-python")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    results = []
    for pair in options.pairs:
        path, gguf = pair.split("=")
        for threads in options.threads:
            peer = Peer(options.peer, gguf, threads)
            with rkf.load(path, threads=threads) as model:
                for case in CASES:
                    tokens = int(case.split()[1])
                    row = {"rkf": Path(path).name, "peer": Path(gguf).name, "threads": threads, "case": case}
                    row |= {"rkf_bytes": Path(path).stat().st_size, "peer_bytes": Path(gguf).stat().st_size}
                    row |= compare(partial(ours, model, case), partial(peer.seconds, case), options.rounds)
                    results.append(row)
                    print(
                        f"{row['rkf']} / {row['peer']}, {threads} threads, {case}: {tokens / row['rkf_s']:.0f} /"
                        f" {tokens / row['peer_s']:.0f} tok/s, {row['ratio']:.2f} x"
                        f" ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})",
                        flush=True,
                    )
            peer.close()
    print(json.dumps({"rkf": rkf.__version__, "rounds": options.rounds, "results": results}))


if __name__ == "__main__":
    main()
