"""llama.cpp's side of the quality table, for a Python that has llama-cpp-python and numpy; imports nothing of rkf.

`quantize F16.gguf OUT.gguf TYPE IMPORTANCE.npz` quantises a model; importance: GGUF tensor name -> f32[cols].
`logits MODEL.gguf TOKENS.npy` writes the raw f32 logits that predict every scored token of u32[windows, ctx] to stdout.
"""

import ctypes
import sys

import llama_cpp
import numpy as np


def quantize(source: str, out: str, type_name: str, importance: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type_name}")
    with np.load(importance) as arrays:
        held = {name: np.ascontiguousarray(arrays[name], np.float32) for name in arrays.files}
    entry = llama_cpp.llama_model_imatrix_data
    entries = (entry * (len(held) + 1))()  # the last one has no name
    for slot, (name, values) in zip(entries, held.items(), strict=False):
        slot.name, slot.size = name.encode(), values.size
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = entries
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)):
        raise SystemExit(f"{source}: llama.cpp could not quantise it to {type_name}")


def logits(model: str, tokens: str) -> None:
    windows = np.load(tokens)
    ctx = windows.shape[1]
    llama = llama_cpp.Llama(model, n_ctx=ctx, n_batch=ctx, logits_all=True, verbose=False)
    for window in windows:
        llama.reset()
        llama.eval(window.tolist())
        sys.stdout.buffer.write(np.ascontiguousarray(llama.scores[ctx // 2 : ctx - 1], np.float32).data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    {"quantize": quantize, "logits": logits}[sys.argv[1]](*sys.argv[2:])
