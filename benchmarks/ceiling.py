"""The time to only load a model's rank planes: the ceiling of decoding, which reads each plane once per token.

One loop serves all models: eight streams per plane, all threads, and no arithmetic except one addition that stops the
compiler from removing the load. It exists with the kernels' prefetches and without any; the faster one counts. `check`
compares it with numpy: the same sum of the same bytes, and the rate of a plain sum over a large array.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import llvmlite.binding as llvm
import numpy as np
from numba import types
from numpy.typing import NDArray

from rkf.file.container import Container
from rkf.format.matrix import ClusteredMatrix
from rkf.runtime import cpu_features
from rkf.runtime.kernels.build import emit, machine
from rkf.runtime.kernels.inline import inline
from rkf.runtime.kernels.memory import load, prefetch, store
from rkf.runtime.kernels.simd import splat
from rkf.runtime.kernels.vectors import I32x16
from rkf.runtime.structs import SLOT_BYTES

Bytes = NDArray[np.uint8]
PREFETCHING, PLAIN = SYMBOLS = "load_prefetching", "load_plain"
STREAMS, STEP, AHEAD_BYTES = 8, 64, cpu_features.prefetch_bytes(cpu_features.level())
LOCALITY = 2 if cpu_features.prefetches_far(cpu_features.level()) else 3


def _load_only(prefetches: bool) -> Callable[..., None]:
    @inline
    def following(total, address):
        if prefetches:
            prefetch(address + AHEAD_BYTES, LOCALITY)
        return total + load(I32x16, address)

    def load_only(spans, count, passes, out):
        """spans: i64[count, 2], address and bytes (a multiple of 512); out: sums of all 32-bit words in 16 lanes."""
        a = b = c = d = e = f = g = h = splat(I32x16, types.int32(0))
        for _ in range(passes):
            for span in range(count):
                address = load(types.int64, spans + span * 16)
                apart = load(types.int64, spans + span * 16 + 8) // STREAMS
                for at in range(address, address + apart, STEP):
                    a, b = following(a, at), following(b, at + apart)
                    c, d = following(c, at + 2 * apart), following(d, at + 3 * apart)
                    e, f = following(e, at + 4 * apart), following(f, at + 5 * apart)
                    g, h = following(g, at + 6 * apart), following(h, at + 7 * apart)
        store(out, a + b + c + d + e + f + g + h)

    return load_only


class Loader:
    """The loops, compiled for this CPU."""

    def __init__(self) -> None:
        target = machine(cpu_features.level())
        builder = llvm.JITLibraryBuilder()
        for symbol in SYMBOLS:
            code = emit(_load_only(symbol == PREFETCHING), (types.int64,) * 4, symbol, target)
            builder = builder.add_object_img(code).export_symbol(symbol)
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self._compiler = llvm.create_lljit_compiler()
        self._library = builder.link(self._compiler, "load_only")
        function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)
        self._functions = {symbol: function(self._library[symbol]) for symbol in SYMBOLS}

    def seconds(self, arrays: Sequence[Bytes], threads: int, passes: int = 4) -> float:
        """Seconds for one pass over all arrays, on all threads, each with its share of every array."""
        shares = [[part for array in arrays for part in _shares(array, threads)[t : t + 1]] for t in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(self.total, shares))  # the warm-up
            return min(self._seconds(pool, shares, passes, symbol) for symbol in SYMBOLS)

    def _seconds(self, pool: ThreadPoolExecutor, shares: list[list[Bytes]], passes: int, symbol: str) -> float:
        began = perf_counter()
        list(pool.map(lambda share: self.total(share, passes, symbol), shares))
        return (perf_counter() - began) / passes

    def total(self, arrays: Sequence[Bytes], passes: int = 1, symbol: str = PLAIN) -> int:
        """The sum of all 32-bit words modulo 2^32, times `passes`, in the multiples of 512 bytes of each array."""
        spans = np.array([(array.ctypes.data, array.size // 512 * 512) for array in arrays], np.int64)
        out = np.zeros(2 * SLOT_BYTES, np.uint8)
        lanes = out[-out.ctypes.data % SLOT_BYTES :][:SLOT_BYTES].view(np.uint32)
        self._functions[symbol](spans.ctypes.data, len(spans), passes, lanes.ctypes.data)
        return int(lanes.sum(dtype=np.uint64)) % (1 << 32)

    def check(self, size: int = 1 << 28) -> tuple[float, float]:
        """(bytes a second of the loop, of numpy's sum) over one large array on one thread; both sums must agree."""
        array = np.random.Generator(np.random.SFC64(0)).integers(0, 256, size, np.uint8)
        words = array.view(np.uint64)
        wanted = int(array.view(np.uint32).sum(dtype=np.uint64)) % (1 << 32)
        if any(self.total([array], symbol=symbol) != wanted for symbol in SYMBOLS):
            raise SystemExit("the load-only loop and numpy read different bytes")
        began = perf_counter()
        words.sum()
        plain = perf_counter() - began
        return size / self.seconds([array], 1, passes=1), size / plain


def _shares(array: Bytes, threads: int) -> list[Bytes]:
    step = -(-array.size // threads)
    return [array[low : low + step] for low in range(0, array.size, step)]


def planes(container: Container) -> list[Bytes]:
    """Every rank plane that a token reads, as flat bytes in place. An alias is the same plane, so a tied embedding
    counts because the head reads it. A matrix that is only looked up, one row per token, is left out.
    """
    untied = container.tensors["lm_head.weight"].kind != "alias"
    names = [name for name in container.tensors if not (untied and name == "model.embed_tokens.weight")]
    tensors = (container.load(name) for name in names if container.tensors[name].kind != "alias")
    return [plane.reshape(-1) for tensor in tensors if isinstance(tensor, ClusteredMatrix) for plane in tensor.planes]
