"""Memory and speed of long contexts: `python -m benchmarks.context MODEL.rkf [--tokens 32768] [--threads N]`.

Prints what `rkf info --context` tells of so many tokens, what they then take in this process, and how fast a token is
after 2,048 and after all of them, in turn. Only the first 256 tokens are computed; their keys and values are repeated,
so a model of random weights (random_model.py) is ready at once. The last line is everything as JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import cast

import numpy as np

from rkf.file.container import open_file
from rkf.runtime.backend import Row
from rkf.runtime.cpu import CpuBackend
from rkf.runtime.kv_cache import FORMATS, CacheLayout, Page
from rkf.runtime.paged_sequence import PagedSequence
from rkf.runtime.resident import resident
from rkf.runtime.structs import PAGE

SHORT = 2048
ROUNDS = 31
TOKEN = np.ones(1, np.int64)


def filled(backend: CpuBackend, tokens: int) -> PagedSequence:
    """A sequence of so many tokens, a multiple of 256: the first 256, again and again."""
    sequence: PagedSequence = backend.new_sequence(tokens + PAGE)
    backend.forward([Row(sequence, np.arange(1, PAGE + 1))])
    first = [cast(Page, table._pages[0]) for table in sequence._tables]
    for _ in range(tokens // PAGE - 1):
        sequence.reserve(PAGE)
        for table, page in zip(sequence._tables, first, strict=True):
            cast(Page, table._pages[-1]).array[:] = page.array
        sequence.advance(PAGE)
    return sequence


def step_s(backend: CpuBackend, sequence: PagedSequence) -> float:
    """Seconds of one token more."""
    began = perf_counter()
    backend.forward([Row(sequence, TOKEN)])
    return perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kv-cache", choices=FORMATS, default="int16")
    options = parser.parse_args()
    with open_file(options.model) as container:
        backend = CpuBackend(container, threads=options.threads, cache_format=options.kv_cache)
        step_s(backend, filled(backend, PAGE))
        before = resident(options.model)
        long = filled(backend, options.tokens)
        step_s(backend, long)
        after = resident(options.model)
        taken = [each["rss_bytes"] - each["mapped_bytes"] for each in (before, after)]
        short = filled(backend, SHORT)
        pairs = [(step_s(backend, short), step_s(backend, long)) for _ in range(ROUNDS)]
        report = {
            "tokens": options.tokens,
            "threads": backend.threads,
            "told_bytes": CacheLayout(backend.metadata.program, options.kv_cache).bytes_of(options.tokens),
            "taken_bytes": taken[1] - taken[0],
            "short_s": median(short for short, _ in pairs),
            "long_s": median(long for _, long in pairs),
            "rate": median(short / long for short, long in pairs),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
