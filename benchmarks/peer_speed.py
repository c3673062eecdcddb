"""llama.cpp's side of the speed comparison, for a Python that has llama-cpp-python; imports nothing of rkf.

`MODEL.gguf THREADS CONTEXT` loads a model. For each line `prefill N` or `decode N AFTER` on stdin it prints the seconds
for N tokens in one batch, or for N tokens one by one after AFTER tokens of context, always taking the most likely
token.
"""

import ctypes
import sys
from time import perf_counter

import llama_cpp
import numpy as np


def main(path: str, threads: int, context: int) -> None:
    model = llama_cpp.Llama(
        path, n_ctx=context, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    vocab = model.n_vocab()
    print("ready", flush=True)
    for line in sys.stdin:
        what, count, *after = line.split()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)
        _feed(model, [1 + i % 1000 for i in range(int(after[0]) if after else 0)])
        began = perf_counter()
        if what == "prefill":
            _feed(model, [1 + i % 1000 for i in range(int(count))])
        else:
            token = 1
            for _ in range(int(count)):
                _feed(model, [token])
                logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(model.ctx), (vocab,))
                token = int(logits.argmax())
        print(perf_counter() - began, flush=True)


def _feed(model: llama_cpp.Llama, tokens: list[int]) -> None:
    for low in range(0, len(tokens), 512):
        part = tokens[low : low + 512]
        ids = (ctypes.c_int32 * len(part))(*part)  # the batch holds only a pointer to it
        if llama_cpp.llama_decode(model.ctx, llama_cpp.llama_batch_get_one(ids, len(part))):
            raise SystemExit("llama_decode failed")
    llama_cpp.llama_synchronize(model.ctx)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
