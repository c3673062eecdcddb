"""The structs that Python fills and compiled code reads. Knows no numba: a warm start never imports it.

All addresses and counts are int64; a 0 address means "not there". Strides are bytes.
"""

from __future__ import annotations

import numpy as np

BLOCK = 128  # columns of one step of a fast kernel; activations are packed in blocks, the last one padded with zeros
PACKED_BLOCK_BYTES = 2 * BLOCK


def end_column(columns: int) -> int:
    """Where rows of so many columns end in the planes that kernels read: the last step of a kernel ends here.

    It may begin inside the step before it, whose columns then have zeros among its activations. So no kernel reads past
    a row, and none masks its loads. Rows that are shorter than a block, or that end within a byte, are copied, padded.
    """
    return columns if columns >= BLOCK and columns % 8 == 0 else -(-columns // BLOCK) * BLOCK


# Activations of the fast path are integers in -LIMIT..LIMIT, split as 128 * high + low into two signed bytes.
ACTIVATION_LIMIT = 16256
# The sum of their absolute values stays below this, so that no sum of products with weights in -128..127 leaves int32.
ACTIVATION_SUM_LIMIT = 0.99 * 2**24
# Rounded activations: each ROUNDED neighbours are signed bytes times one whole number of at most 128, their multiple.
# Rounding makes the sum of absolute values at most an eighth larger. After the integers of a row come, for each step of
# a kernel, its bytes and its multiples (i32), or what AVX2 has in their place (packing.py).
ROUNDED = 32
ROUNDED_LIMIT = 127.4  # a byte before it is rounded
ROUNDED_SUM_LIMIT = 0.87 * 2**24
ROUNDED_BLOCK_BYTES = 320  # in a block, in whole cache lines: what AVX2 needs, more than the others
LANES = 16  # f32 sums run in this many lanes on every CPU, so that every CPU gives the same bits

_WORD = "<i8"


def _struct(words: str, floats: str = "") -> np.dtype:
    return np.dtype([(name, _WORD) for name in words.split()] + [(name, "<f4") for name in floats.split()], align=True)


# A weight matrix, prepared for its kernels.
#   multiply_one, multiply_many: addresses of kernels; decode_row: address of the kernel that writes one f32 row
#   end: end_column(columns)
#   plane*, stride*, width*: rank planes, the bytes of their rows, the bits of their fields (0: no such plane)
#   ahead: how far ahead a 4-bit plane is prefetched, in bytes; others in proportion
#   table: u8[tables, digits, table_bytes] lookup tables of the fast path; offset: added to each looked-up byte
#   scale, shift: f32 by row (step 4) or one value (step 0): row = scale * integer row + shift * sum of activations
#   centroids, a, b: exact decode; a_row: bytes from one row's factors to the next; group: columns per factor
#   dense: the values of a dense tensor, row-major
#   exception_start: i64[rows + 1] into exception_row i32, exception_column i32, exception_value f32 (the exact weight)
#   and exception_delta f32 (the correction that the fast path must add)
#   bias: f32[rows], added to the output
MATRIX = _struct(
    "multiply_one multiply_many decode_row rows columns end "
    "plane0 plane1 plane2 stride0 stride1 stride2 width0 width1 width2 ahead "
    "table table_bytes digits rows_per_table offset scale scale_step shift shift_step "
    "centroids centroid_bytes a a_row b b_row group dense "
    "exception_start exception_row exception_column exception_value exception_delta bias"
)

# Activations of some tokens: f32[tokens, columns] and, for fast matrices, packed integers with a scale and a sum per
# token. Columns are padded with zeros to a whole block. end: end_column(columns); rounded: where the bytes of rounded
# activations begin in a packed row, 0 for none
ACTIVATION = _struct("columns end values values_stride packed packed_stride scale total rounded")

# A value of the program in memory: `stride` bytes from one token's row to the next. private: 1 if each thread has its
# own copy, with `address` relative to its THREAD.memory; 0 if all threads share one.
VALUE = _struct("address stride private")

# One Linear, as the jobs of its phase read it.
#   input: address of its ACTIVATION, input_private: as in VALUE
#   partner: another matrix of the same input, computed together with it (gates)
#   out: the result: the matrix's output y, its sum with the present values, or act(y) * the partner's output; columns
#   of a row past the last are zeros and stay zeros
#   scale: of y in the sum, and of logits; limit, alpha, shift: of the gate (rkf/model/ops.py); softcap: of logits
PRODUCT = np.dtype(
    [(name, _WORD) for name in ("matrix", "input", "input_private", "top", "partner")]
    + [("out", VALUE)]
    + [(name, "<f4") for name in ("scale", "limit", "alpha", "shift", "softcap")],
    align=True,
)

# A claimable share of a product phase: rows low … high - 1 of a product's matrix.
JOB = _struct("product low high")

# One step of a pass, whose items the threads share: work(item, arguments, batch, thread).
#   counted: the number of items, `times` each: COUNTED; seen: limits the pages (ATTENTION)
#   own: with one token, every thread runs the single item for itself, in private memory, without waiting
#   part: the part that its time counts towards (PARTS)
PHASE = _struct("work arguments counted times seen own part")
COUNTED = ("once", "tokens", "blocks", "pages", "segments")

# The arguments of a token phase: the work on a token's row, in order. A MICRO: work(token, arguments, batch, thread).
TOKENS = _struct("micros count")
MICRO = _struct("work arguments")

# The arguments of micro-ops (kernels/token_ops.py); columns are those of one row, which holds its groups side by side.
EMBED = np.dtype([("matrix", _WORD), ("ids", _WORD), ("out", VALUE), ("columns", _WORD), ("scale", "<f4")], align=True)
TAKE = np.dtype([("source", VALUE), ("out", VALUE), ("rows", _WORD), ("columns", _WORD)], align=True)
# step: from the weights and biases of one group to those of the next, in bytes; 0: all have the same.
NORM = np.dtype(
    [("source", VALUE), ("out", VALUE)]
    + [(name, _WORD) for name in ("weight", "bias", "columns", "groups", "step")]
    + [("epsilon", "<f4")],
    align=True,
)
PACK = _struct("activation private rows")
PAIR = np.dtype(
    [(name, VALUE) for name in ("a", "b", "out")]
    + [(name, _WORD) for name in ("columns", "a_single", "b_single")]
    + [(name, "<f4") for name in ("scale", "limit", "alpha", "shift")],
    align=True,
)
CONCAT = np.dtype(
    [(name, VALUE) for name in ("a", "b", "out")] + [(name, _WORD) for name in ("heads", "a_columns", "b_columns")],
    align=True,
)
XIELU = np.dtype(
    [("source", VALUE), ("out", VALUE), ("columns", _WORD)]
    + [(name, "<f4") for name in ("limit", "positive", "negative", "beta", "eps")],
    align=True,
)
SCALE = np.dtype(
    [("source", VALUE), ("out", VALUE)]
    + [(name, _WORD) for name in ("columns", "factors", "by_token")]
    + [("scale", "<f4")],
    align=True,
)
HADAMARD = np.dtype(
    [("source", VALUE), ("out", VALUE), ("columns", _WORD), ("block", _WORD), ("scale", "<f4")], align=True
)
ROPE = np.dtype(
    [("source", VALUE), ("out", VALUE)]
    + [(name, _WORD) for name in ("sequences", "positions", "table", "turned", "head_dim", "heads")]
    + [("scale", "<f4")],
    align=True,
)

# One Attention with its slot of the cache: head `n` of a page is at page + offset + n * head_bytes.
#   sequences, positions: i64[tokens] (BATCH); group: a sequence's page table; padded: value_dim in whole strips
#   seen: the last so many positions, if negative those of the own chunk of -seen, 0: all
#   sinks: f32[heads]; partials: of one token, [pages, heads], partial_bytes each; score_bytes: of a thread's scores, a
#   query; threads: that take the pages of one token in turn
#   blocks: i64[blocks + 1], the first token of each block of neighbours
ATTENTION = np.dtype(
    [(name, VALUE) for name in ("q", "k", "v", "out")]
    + [
        (name, _WORD)
        for name in (
            *("sequences", "positions", "blocks", "group", "offset", "head_bytes"),
            *("heads", "kv_heads", "head_dim", "value_dim", "padded", "seen", "sinks", "partials"),
            *("partial_bytes", "score_bytes", "threads"),
        )
    ]
    + [("softcap", "<f4")],
    align=True,
)

# The choice of a token's experts (kernels/experts.py): what Route says (rkf/model/ops.py), with the products of its
# matrix as the source; select, factors: f32[experts].
ROUTE = np.dtype(
    [("source", VALUE), ("out", VALUE)]
    + [(name, _WORD) for name in ("select", "factors", "experts", "count", "groups", "top_groups", "normalise")]
    + [(name, "<f4") for name in ("add", "floor", "scale")],
    align=True,
)

# Slots of several tokens, by expert: starts i64[experts + 1], cursors i64[experts], slots i64[tokens, count], weights
# f32[slots]; source, gathered: ACTIVATIONs of the tokens and of the slots.
SLOTS = np.dtype(
    [("route", VALUE)]
    + [
        (name, _WORD)
        for name in (
            *("starts", "cursors", "slots", "weights", "experts", "count"),
            *("source", "gathered", "packed_bytes", "values_bytes"),
        )
    ],
    align=True,
)

# Products of experts, in items of `step` rows, `chunks` an expert: of gate and up (matrix, partner: a and b, then out),
# or of down (matrix: a). rows: of one expert; starts, weights: as in SLOTS.
EXPERTS = np.dtype(
    [(name, VALUE) for name in ("route", "a", "b", "out")]
    + [
        (name, _WORD)
        for name in (
            *("input", "input_private", "matrix", "partner", "bias", "partner_bias", "rows", "step", "chunks"),
            *("count", "starts", "weights", "scale_input"),
        )
    ]
    + [(name, "<f4") for name in ("limit", "alpha", "shift")],
    align=True,
)

# The sum of a token's experts. slots: as in SLOTS, 0 for one token.
MIX = np.dtype(
    [(name, VALUE) for name in ("y", "route", "out")]
    + [(name, _WORD) for name in ("slots", "bias", "columns", "count", "scale_input")],
    align=True,
)

# Ops with a state (kernels/recurrent.py), at `state` bytes behind the address in word `state_word` of a sequence;
# segments: i64[segments + 1], the first token of each sequence in the call; padded: columns of a row to whole lanes.
CONV = np.dtype(
    [("source", VALUE), ("out", VALUE)]
    + [
        (name, _WORD)
        for name in (
            *("sequences", "segments", "state_word", "state"),
            *("weight", "bias", "columns", "padded", "taps", "step", "chunks"),
        )
    ],
    align=True,
)
DELTA = np.dtype(
    [(name, VALUE) for name in ("source", "a", "b", "out")]
    + [
        (name, _WORD)
        for name in (
            *("sequences", "segments", "state_word", "state"),
            *("a_log", "dt_bias", "key_heads", "value_heads", "key_dim", "value_dim", "padded"),
        )
    ],
    align=True,
)
SCAN = np.dtype(
    [(name, VALUE) for name in ("source", "dt", "out")]
    + [
        (name, _WORD)
        for name in (
            *("sequences", "segments", "state_word", "state"),
            *("a_log", "dt_bias", "d", "heads", "head_dim", "groups", "state_dim", "padded"),
        )
    ]
    + [("dt_min", "<f4"), ("dt_max", "<f4")],
    align=True,
)

# The constant data between calls. Phases of the layers for one token and for several, and of the top for one wanted
# token and for several, and of the top up to hidden states; slots: how threads share phases (kernels/sync.py);
# threads: how many there are.
PLAN = _struct(
    "one one_count many many_count top_one top_one_count top_many top_many_count hidden hidden_count slots threads"
)

# One thread's private memory: values and activations, a tile of decoded weights, scores of a page, partial attentions
# of the pages so far and of one page, outputs that a job makes a result of; clock: where to count time (PARTS), 0 to
# count nothing.
THREAD = _struct("memory scratch scores totals parts outputs clock")

# One call. wanted: tokens that get logits, f32 rows at `logits`; hidden: 1 if they get hidden states instead, which are
# left in the plan's memory; position: that of the token, if there is only one; blocks: of neighbouring tokens that
# belong to one sequence and attend together. The arrays with one entry per token (ids, positions, sequences, wanted
# rows) belong to the plan, so a late thread may still read them.
BATCH = _struct("tokens wanted logits logits_stride hidden position blocks segments")

# The parts of a thread's time. clock: i64[1 + len(PARTS)], ticks at the last change, then ticks by part. "outside" is
# the time between calls: Python, sampling; "vectors": work by token (norms, packing); "waiting": for other threads, at
# the end of each phase.
PARTS = (
    *("outside", "embedding", "vectors", "products", "added products", "gated products", "cache", "attention"),
    *("experts", "states", "logits", "waiting"),
)

TILE_ROWS = 32  # rows decoded at a time by a product of many tokens
PAGE = 256  # positions of one page of the cache
BLOCK_TOKENS = 4  # neighbouring tokens that attend together
SPAN = 64  # positions whose weights are rounded together, in attention over integers
WIDE = 32  # columns of values that attention sums at a time; a position's values are padded to whole strips
PARTIAL_HEADER = 64  # bytes before the weighted values of a partial attention: maximum, sum

# Phases are numbered over the life of a pool: the tag. The slots for claimed and for finished items hold
# tag << COUNT_BITS | count. 43 bits of phases last for months at one phase per microsecond.
COUNT_BITS = 20
CLAIM_SLOTS = 4
SLOT_BYTES = 64
SPINS = 2000  # of about 50 ns each, before a waiting thread yields the core
PATIENCE = 6000  # checks for the next call, beyond SPINS each with a yield, before an idle worker parks: milliseconds

# number: that of the running call (its first phase's tag), alone on its cache line; WRITING while `batch` is written;
# CLOSED ends the workers.
# batch: the call's data, copied from the caller's at `source`.
CALL = np.dtype(
    {
        "names": ["number", "source", "batch"],
        "formats": [_WORD, _WORD, BATCH],
        "offsets": [0, SLOT_BYTES, SLOT_BYTES + 8],
        "itemsize": 3 * SLOT_BYTES,
    }
)
WRITING, CLOSED = 0, -1

# One worker thread. parked is set by compare-and-swap, so it is alone on its line; wake: the caller must wake it.
# batch: the worker's copy of the call's batch, which the next call cannot change.
WORKER = np.dtype(
    {
        "names": ["parked", "seen", "wake", "call", "step", "plan", "thread", "batch"],
        "formats": [*[_WORD] * 7, BATCH],
        "offsets": [0, *(SLOT_BYTES + 8 * i for i in range(7))],
        "itemsize": 4 * SLOT_BYTES,
    }
)
