"""Measures a model's speed on this machine: load, first token, prefill, decode, memory. It times the product itself."""

from __future__ import annotations

from os import PathLike
from time import perf_counter

import numpy as np

from rkf.errors import UsageError
from rkf.runtime.backend import Row
from rkf.runtime.model import Model, load
from rkf.runtime.resident import resident

ROUNDS = 3
MOST_TOGETHER = 1024


def bench(
    path: str | PathLike[str],
    *,
    threads: int | None = None,
    prefill: int = 512,
    decode: int = 128,
    batch: int = 1,
    kv_cache: str | None = None,
    bits: int | None = None,
) -> dict[str, float]:
    """{"prefill_tok_s", "decode_tok_s", "load_s", "first_token_s", "rss_bytes"} of a file on this machine, and
    "batch_tok_s" if `batch` is above 1. threads, kv_cache, bits: as for `rkf.load`.

    load_s: `rkf.load`. first_token_s: from the same start to the first token after a prompt of 8, in this process, so
    both include any compilation. prefill_tok_s: a prompt of `prefill` tokens. decode_tok_s: `decode` tokens one by one
    from an empty context. batch_tok_s: the same for `batch` sequences, one token of each per pass, all tokens counted.
    Rates are the best of 3 rounds after a warm-up. rss_bytes: resident memory at the end; on Linux also mapped_bytes,
    the part that is pages of the file (resident.py).
    """
    if not 1 <= batch <= MOST_TOGETHER:
        raise UsageError(f"batch: expected 1 to {MOST_TOGETHER} sequences, got {batch}")
    began = perf_counter()
    with load(path, threads=threads, kv_cache=kv_cache, bits=bits) as model:
        loaded = perf_counter()
        tokens = _tokens(model, prefill, decode)
        _decode_s(model, tokens[:8], 1)
        first = perf_counter()
        _prefill_s(model, tokens[:prefill])  # the warm-up
        together = {}
        if batch > 1:
            together["batch_tok_s"] = batch * decode / min(_batch_s(model, batch, decode) for _ in range(ROUNDS))
        return {
            "prefill_tok_s": prefill / min(_prefill_s(model, tokens[:prefill]) for _ in range(ROUNDS)),
            "decode_tok_s": decode / min(_decode_s(model, tokens[:1], decode) for _ in range(ROUNDS)),
            **together,
            "load_s": loaded - began,
            "first_token_s": first - began,
            **resident(path),
        }


def _tokens(model: Model, prefill: int, decode: int) -> np.ndarray:
    longest = model.config.context_length - 1
    if not (1 <= prefill <= longest and 1 <= decode <= longest):
        raise UsageError(f"prefill and decode: expected 1 to {longest} tokens, got {prefill} and {decode}")
    # Any ids will do: the time of a step does not depend on them.
    return np.random.Generator(np.random.Philox(key=0)).integers(0, model.config.vocab_size, max(prefill, 8))


def _prefill_s(model: Model, tokens: np.ndarray) -> float:
    sequence = model.backend.new_sequence(len(tokens))
    began = perf_counter()
    model.backend.forward([Row(sequence, tokens)])
    return perf_counter() - began


def _decode_s(model: Model, prompt: np.ndarray, steps: int) -> float:
    sequence = model.backend.new_sequence(len(prompt) + steps)
    began = perf_counter()
    for _ in range(steps):
        prompt = np.argmax(model.backend.forward([Row(sequence, prompt)]), axis=1)
    return perf_counter() - began


def _batch_s(model: Model, sequences: int, steps: int) -> float:
    backend = model.backend
    together = [backend.new_sequence(steps) for _ in range(sequences)]
    tokens = np.arange(sequences) % model.config.vocab_size
    began = perf_counter()
    for _ in range(steps):
        rows = [Row(sequence, tokens[n : n + 1]) for n, sequence in enumerate(together)]
        tokens = np.argmax(backend.forward(rows), axis=1)
    return perf_counter() - began
