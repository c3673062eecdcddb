"""The structs that Python fills and compiled code reads. Knows no numba: a warm start never imports it.

All addresses and counts are int64; a 0 address means "not there". Strides are bytes.
"""

from __future__ import annotations

import numpy as np

BLOCK = 128  # columns of one step of a fast kernel; activations are packed by blocks, the last one padded with zeros
PACKED_BLOCK_BYTES = 2 * BLOCK
# Activations of the fast path are integers in -LIMIT..LIMIT, split as 128 * high + low into two signed bytes.
ACTIVATION_LIMIT = 16256
# Their absolute sum stays below this, so that no sum of products with weights in -128..127 leaves int32.
ACTIVATION_SUM_LIMIT = 0.99 * 2**24
LANES = 16  # f32 sums run in so many lanes on every CPU, so that every CPU gives the same bits

_WORD = "<i8"


def _struct(words: str, floats: str = "") -> np.dtype:
    return np.dtype([(name, _WORD) for name in words.split()] + [(name, "<f4") for name in floats.split()], align=True)


# A weight matrix, ready for its kernels.
#   multiply_one, multiply_many: addresses of kernels; decode_row: address of the kernel that writes one f32 row
#   plane*, stride*, width*: rank planes, the bytes of their rows, the bits of their fields (0: no such plane)
#   table: u8[tables, digits, table_bytes] lookup tables of the fast path; offset: what to add to each looked-up byte
#   scale, shift: f32 by row (step 4) or one value (step 0): row = scale * integer row + shift * sum of activations
#   centroids, a, b: exact decode; a_row: bytes from one row's factors to the next's; group: columns of one factor
#   dense: the values of a dense tensor, row-major
#   exception_start: i64[rows + 1] into exception_row i32, exception_column i32, exception_value f32 (what the weight
#   is) and
#   exception_delta f32 (what the fast path must still add to it)
#   bias: f32[rows], added to the output
MATRIX = _struct(
    "multiply_one multiply_many decode_row rows columns "
    "plane0 plane1 plane2 stride0 stride1 stride2 width0 width1 width2 "
    "table table_bytes digits rows_per_table offset scale scale_step shift shift_step "
    "centroids centroid_bytes a a_row b b_row group dense "
    "exception_start exception_row exception_column exception_value exception_delta bias"
)

# Activations of some tokens: f32[tokens, columns] and, for fast matrices, packed integers with a scale and a sum a
# token. Columns are padded with zeros to a whole block.
ACTIVATION = _struct("columns values values_stride packed packed_stride scale total")

# A claimable share of a product: rows low..high of a matrix (and of its partner: gate and up), whose output begins at
# `output`.
JOB = _struct("matrix partner low high output")

# The jobs of one product phase.
PHASE = _struct("jobs count")

LAYER = np.dtype(
    [(name, _WORD) for name in ["index", "attention_norm", "feed_norm", "q_norm", "k_norm"]]
    + [(name, PHASE) for name in ["qkv", "output", "gate_up", "down"]],
    align=True,
)

# What does not change between calls. Buffers hold TILE tokens; strides are bytes from one token to the next.
#   x: the residual stream; qkv: queries, keys, values; gate_up: both, gate first
#   norm_input, mixed_input, feed_input: ACTIVATIONs of all tokens (hidden, heads * head_dim, intermediate columns)
#   head_bytes: one head's region in a page of the cache; partials: of one token, [pages, heads]
#   slots: where threads agree (kernels/sync.py)
PLAN = np.dtype(
    [
        (name, _WORD)
        for name in [
            "layers",
            "layer_count",
            "hidden",
            "heads",
            "kv_heads",
            "head_dim",
            "padded_head_dim",
            "window",
            "embedding",
            "final_norm",
            "x",
            "x_stride",
            "qkv",
            "qkv_stride",
            "gate_up",
            "gate_up_stride",
            "delta",
            "delta_stride",
            "head_bytes",
            "partials",
            "partial_bytes",
            "slots",
        ]
    ]
    + [("head", PHASE)]
    + [(name, ACTIVATION) for name in ("norm_input", "mixed_input", "feed_input")]
    + [("epsilon", "<f4"), ("query_scale", "<f4")],
    align=True,
)

# One thread's own memory: activations of one token, a tile of decoded weights, scores of a page, partial attentions: of
# the pages so far and of one page; clock: where to count time (PARTS), 0 where nobody wants to know.
THREAD = np.dtype(
    [(name, ACTIVATION) for name in ("norm_input", "mixed_input", "feed_input")]
    + [(name, _WORD) for name in ("scratch", "scores", "totals", "parts", "clock")],
    align=True,
)

# One call: token ids and positions i64[tokens]; pages i64[tokens]: the address of the list of page addresses of each
# token's cache; rope f32[positions, 2, head_dim / 2]: cosines, then sines; where logits go (of all tokens, or of the
# last; 0: nobody wants them); first_page, page_count: what one token attends to; block: how many neighbouring tokens
# belong to one sequence and attend together (BLOCK_TOKENS, or 1 where each token is another sequence's).
BATCH = _struct("tokens ids positions pages rope logits logits_stride all_logits first_page page_count block")

# What a thread's time goes into. clock: i64[1 + len(PARTS)], ticks at the last change, then ticks by part. "outside" is
# between calls: Python, sampling; "waiting" for other threads, at the end of each phase.
PARTS = ("outside", "embedding", "norms", "qkv", "rope", "attention", "output", "gate_up", "down", "head", "waiting")

TILE_ROWS = 32  # rows that a product of many tokens decodes at a time
PAGE = 256  # positions of one page of the cache
BLOCK_TOKENS = 4  # neighbouring tokens that attend together
WIDE = 32  # columns of values that attention sums at a time; a position's values are padded to whole strips
PARTIAL_HEADER = 64  # bytes before the weighted values of a partial attention: maximum, sum

# Phases: a tag is call << PHASE_BITS | phase; slots of claimed and of finished items hold tag << COUNT_BITS | count.
PHASE_BITS = 11
COUNT_BITS = 20
CLAIM_SLOTS = 4
SLOT_BYTES = 64
SPINS = 2000  # of about 50 ns each, before a waiting thread lets others run
PHASES_PER_LAYER = 10  # of a pass of several tokens (kernels/step.py); one token has fewer
PATIENCE = 6000  # looks at the next call, past SPINS each with a yield, before an idle worker parks: some milliseconds

# The number of the call that runs, alone on its cache line, WRITING while `batch` is; CLOSED ends the workers.
# batch: what the call is about, copied from the caller's at `source`.
CALL = np.dtype(
    {
        "names": ["number", "source", "batch"],
        "formats": [_WORD, _WORD, BATCH],
        "offsets": [0, SLOT_BYTES, SLOT_BYTES + 8],
        "itemsize": 3 * SLOT_BYTES,
    }
)
WRITING, CLOSED = 0, -1

# One worker thread: parked is taken by compare-and-swap, so it is alone on its line; wake: whom the caller must wake.
# batch: the worker's copy of the call's, which the next call cannot change under its hands.
WORKER = np.dtype(
    {
        "names": ["parked", "seen", "wake", "call", "step", "plan", "thread", "batch"],
        "formats": [*[_WORD] * 7, BATCH],
        "offsets": [0, *(SLOT_BYTES + 8 * i for i in range(7))],
        "itemsize": 4 * SLOT_BYTES,
    }
)
