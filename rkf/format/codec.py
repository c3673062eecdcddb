"""Section codecs: stored bytes to decoded bytes and back. Knows no file and no tensor.

A zstd section is cut into chunks of ZSTD_CHUNK_BYTES decoded bytes (the last may be short). Each chunk is exactly one
frame that states its size. So memory is allocated only for known sizes, and chunks go to several threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any, TypeVar

import numpy as np
import zstandard
from numpy.typing import NDArray

from rkf.errors import IntegrityError
from rkf.format.constants import MAX_ZSTD_EXPANSION, ZSTD_CHUNK_BYTES, ZSTD_WINDOW_LOG_MAX

# Planes have almost no repeats: levels 1 to 19 are within 0.1 % of each other, and 1 is the fastest (docs/log.md).
LEVEL_OF_RANKS = 1
LEVEL_OF_REST = 19  # values, counts, positions
LEVEL_OF_BLOBS = 9  # a tokenizer of 5.4 MB: 1.8 MB after 0.2 s; level 19 leaves 1.5 MB after 4.8 s
T = TypeVar("T")
R = TypeVar("R")


@cache
def workers() -> int:
    """Threads worth starting: the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """work(item) for every item, on all cores, in the order of the items, with few results waiting."""
    with ThreadPoolExecutor(workers()) as pool:
        waiting = []
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * workers():
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def compress_chunk(data: Any, level: int = LEVEL_OF_RANKS) -> bytes:
    """One frame that holds `data` and its size."""
    return zstandard.ZstdCompressor(level=level).compress(data)


@lru_cache(maxsize=8)  # a budget rehearses a conversion several times, with the same tokenizer
def compressed_blob(data: bytes) -> tuple[bytes, ...] | None:
    """The frames of a blob, or None if it stays raw."""
    frames = tuple(compress_chunk(chunk, LEVEL_OF_BLOBS) for chunk in chunks(memoryview(data)))
    return frames if saves(sum(map(len, frames)), len(data)) else None


def saves(stored_length: int, decoded_length: int) -> bool:
    """Whether to store a section packed: it must become smaller, but not so small that readers refuse it."""
    return stored_length < decoded_length <= MAX_ZSTD_EXPANSION * stored_length


def chunk_count(length: int) -> int:
    """The number of chunks of a section with this many decoded bytes."""
    return -(-length // ZSTD_CHUNK_BYTES)


def chunks(data: memoryview) -> Iterator[memoryview]:
    """`data` cut into chunks like a zstd section."""
    for start in range(0, len(data), ZSTD_CHUNK_BYTES):
        yield data[start : start + ZSTD_CHUNK_BYTES]


def decompress(stored: memoryview, lengths: tuple[int, ...], decoded_length: int, where: str) -> NDArray[np.uint8]:
    """The decoded bytes, `u8[decoded_length]`, of a section whose chunks are stored in `lengths` bytes each."""
    out = np.empty(decoded_length, np.uint8)
    jobs, start = [], 0
    for number, length in enumerate(lengths):
        target = out[number * ZSTD_CHUNK_BYTES : (number + 1) * ZSTD_CHUNK_BYTES]
        jobs.append((stored[start : start + length], target, f"{where}, chunk {number}"))
        start += length
    if len(jobs) == 1:
        _decompress_chunk(jobs[0])
    else:
        for _ in in_order(_decompress_chunk, jobs):
            pass
    out.flags.writeable = False
    return out


def _decompress_chunk(job: tuple[memoryview, NDArray[np.uint8], str]) -> None:
    stored, target, where = job
    try:
        frame = zstandard.get_frame_parameters(stored)
        if frame.content_size != len(target) or frame.dict_id or frame.window_size > 1 << ZSTD_WINDOW_LOG_MAX:
            raise IntegrityError(
                f"{where}: expected a frame of {len(target)} bytes, window <= 2^{ZSTD_WINDOW_LOG_MAX}, no dictionary, "
                f"got {frame.content_size} bytes, window {frame.window_size}, dictionary {frame.dict_id}"
            )
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << ZSTD_WINDOW_LOG_MAX)
        data = decompressor.decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"{where}: expected one whole zstd frame, got: {error}") from None
    target[:] = np.frombuffer(data, np.uint8)
