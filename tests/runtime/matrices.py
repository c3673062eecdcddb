"""Random clustered matrices, and one product through a kernel, for tests of kernels."""

import ctypes

import numpy as np

from rkf.format import bitpack
from rkf.format.constants import index_bits
from rkf.format.matrix import Affine, ClusteredMatrix, Exceptions
from rkf.runtime import jit
from rkf.runtime.matrices import Memory, clustered
from rkf.runtime.structs import ACTIVATION, BLOCK, end_column

PRODUCT = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 8)
ROW = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)
WORK = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)


def random_matrix(k, rows, columns, *, grid=True, grouped=False, affine="row", exceptions=0, tables=1, seed=0):
    """affine: "none", "tensor", "row", "both" (row, with b) or a group size. grouped: 64 values, each four of which are
    evenly spaced (`rkf.cluster.grid`).
    """
    random = np.random.Generator(np.random.Philox(key=seed))
    indices = random.integers(0, k, (rows, columns), dtype=np.uint8)
    if grouped:
        steps = random.choice([1, 2, 3, 4], (tables, 16, 1))
        firsts = np.cumsum(np.pad(3 * steps[:, :-1] + 1, ((0, 0), (1, 0), (0, 0))), axis=1) - 127
        centroids = (firsts + steps * np.arange(4)).reshape(tables, k)
    elif grid:
        centroids = np.stack([np.sort(random.choice(np.arange(-127, 128), k, replace=False)) for _ in range(tables)])
    else:
        centroids = np.sort(random.standard_normal((tables, k)), axis=1)
    count = {"none": 0, "tensor": 1}.get(affine, rows)
    factors = None
    if isinstance(affine, int):
        shape = (rows, -(-columns // affine))
        factors = Affine("group", affine, random.uniform(0.01, 0.1, shape).astype(np.float16))
    elif count:
        a, b = (random.uniform(0.01, 0.1, count).astype(np.float16) for _ in range(2))
        factors = Affine("tensor" if affine == "tensor" else "row", None, a, b if affine == "both" else None)
    exact = None
    if exceptions:
        positions = np.sort(random.choice(rows * columns, exceptions, replace=False)).astype(np.uint32)
        exact = Exceptions(positions, random.standard_normal(exceptions).astype(np.float32), "f32")
    return ClusteredMatrix(
        shape=(rows, columns),
        planes=bitpack.pack(indices, index_bits(k)),
        counts=np.ones((tables, k), np.uint64),
        centroids=centroids.astype(np.float32),
        rows_per_table=-(-rows // tables),
        source_dtype="f32",
        affine=factors,
        exceptions=exact,
    )


def whole_activations(tokens, columns, seed=1):
    """Activations as integers (i64[tokens, columns]) with one scale per token, as packing makes them."""
    random = np.random.Generator(np.random.Philox(key=seed))
    return random.integers(-16256, 16257, (tokens, columns)), random.uniform(1e-4, 1e-3, tokens).astype(np.float32)


def packed(whole, level):
    """The packed form of integers, `u8[tokens, bytes]` (structs.py), implemented again in numpy."""
    tokens, columns = whole.shape
    step, end = 64 if level in ("avx2", "avxvnni") else 128, end_column(columns)
    whole = np.pad(whole, ((0, 0), (0, end - columns)))
    steps = [whole[:, first : first + step] for first in range(0, end - step + 1, step)]
    if end % step:
        steps.append(np.pad(whole[:, end - end % step :], ((0, 0), (step - end % step, 0))))
    whole = np.stack(steps, axis=1)
    if level == "avx2":
        return (
            np.concatenate([whole[..., n::4] for n in (0, 2, 1, 3)], axis=-1)
            .astype(np.int16)
            .view(np.uint8)
            .reshape(tokens, -1)
        )
    even, odd = whole[..., ::2], whole[..., 1::2]
    if level == "portable":
        return np.concatenate([even, odd], axis=-1).astype(np.int16).view(np.uint8).reshape(tokens, -1)
    high = [(part + 64) >> 7 for part in (even, odd)]
    low = [part - 128 * up for part, up in zip((even, odd), high, strict=True)]
    return np.concatenate([*high, *low], axis=-1).astype(np.int8).view(np.uint8).reshape(tokens, -1)


def product(matrix, whole, scale, level, *, fast=True, span=None, run=None):
    """Rows `span` of matrix times activations through its kernel, `f32[tokens, rows]`; rows outside stay NaN. As in the
    step kernel, the caller adds the exceptions of a fast product. run(name, *arguments): calls a kernel, by default
    one of this CPU's.
    """
    memory = Memory()
    prepared = clustered(matrix, memory, level if fast else None)
    kernels = prepared.kernels
    if run is None:
        addresses = jit.addresses([kernels.one, kernels.many, kernels.row], level)
        prepared.struct["decode_row"] = addresses[kernels.row]

        def run(name, *arguments):
            PRODUCT(addresses[name])(*arguments)

    tokens, columns = whole.shape
    values = np.zeros((tokens, -(-columns // BLOCK) * BLOCK), np.float32)
    values[:, :columns] = whole * scale[:, None]
    integers = packed(whole, level)
    x = np.zeros(1, ACTIVATION)
    x["columns"], x["end"] = columns, end_column(columns)
    x["values"], x["values_stride"] = values.ctypes.data, values.strides[0]
    x["packed"], x["packed_stride"] = integers.ctypes.data, integers.strides[0]
    totals = whole.sum(axis=1).astype(np.int32)
    x["scale"], x["total"] = scale.ctypes.data, totals.ctypes.data
    y = np.full((tokens, matrix.rows), np.nan, np.float32)
    scratch = memory.zeros(1 << 22)
    low, high = span or (0, matrix.rows)
    name = kernels.one if tokens == 1 else kernels.many
    run(name, prepared.struct.ctypes.data, x.ctypes.data, tokens, y.ctypes.data, y.strides[0], low, high, scratch)
    return y
