"""The time of one token's product by the width of ranks, with planes in the caches: `python -m benchmarks.widths`.

Nanoseconds for 128 weights on one thread, with exact and with rounded activations, beside a loop that only loads the
same planes (ceiling.py). What a product takes longer than that, it takes for arithmetic; a call from Python is .3 of
it. RKF_CPU selects the level.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np

from benchmarks.ceiling import Loader
from rkf.runtime import cpu_features, jit
from rkf.runtime.buffers import Buffers
from rkf.runtime.matrices import Memory, clustered
from rkf.runtime.structs import PACK, THREAD
from tests.runtime.matrices import PRODUCT, WORK, random_matrix

ROWS, COLUMNS, ROUNDS = 512, 896, 400


def packed(memory: Memory, level: str, rounded: bool) -> int:
    """The address of an ACTIVATION of one token with random values."""
    buffers, name = Buffers(memory), "pack:rounded" if rounded else "pack"
    place = buffers.value("x", COLUMNS, private=False)
    memory.copy(np.random.Generator(np.random.Philox(key=1)).standard_normal(COLUMNS).astype(np.float32), place.address)
    activation, _ = buffers.activation(place, COLUMNS, private=False, rounded=rounded)
    pack, thread = np.zeros(1, PACK), np.zeros(1, THREAD)
    pack["activation"], pack["rows"] = activation, 1
    WORK(jit.addresses([name], level)[name])(0, pack.ctypes.data, 0, thread.ctypes.data)
    return activation


def nanoseconds(k: int, rounded: bool, level: str) -> float:
    """For 128 weights of a matrix with k values, the least of many rounds."""
    memory, matrix = Memory(), random_matrix(k, ROWS, COLUMNS)
    prepared, x = clustered(matrix, memory, level), packed(memory, level, rounded)
    for i, plane in enumerate(matrix.planes):  # aligned, as they are in files
        prepared.struct[f"plane{i}"] = memory.zeros(plane.size)
        memory.copy(plane, int(prepared.struct[f"plane{i}"][0]))
    product = PRODUCT(jit.addresses([prepared.kernels.one], level)[prepared.kernels.one])
    y = memory.zeros(4 * ROWS)
    seconds = []
    for _ in range(ROUNDS):
        began = perf_counter()
        product(prepared.struct.ctypes.data, x, 1, y, 0, 0, ROWS, 0)
        seconds.append(perf_counter() - began)
    return min(seconds) / (ROWS * COLUMNS) * 128e9


def loading(loader: Loader, k: int) -> float:
    """The same for loads alone."""
    planes = [plane.reshape(-1) for plane in random_matrix(k, ROWS, COLUMNS).planes]
    return min(loader.seconds(planes, 1, ROUNDS) for _ in range(4)) / (ROWS * COLUMNS) * 128e9


def main() -> None:
    level, loader = cpu_features.level(), Loader()
    for k in (16, 32, 64, 128):
        exact, rounded = nanoseconds(k, False, level), nanoseconds(k, True, level)
        least = loading(loader, k)
        print(f"{level}, {k:3} values: exact {exact:.2f}, rounded {rounded:.2f}, loads alone {least:.2f} ns")


if __name__ == "__main__":
    main()
