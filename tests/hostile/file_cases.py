"""Packed sections, model metadata and values files: what they may not say. See tests/hostile/cases.py."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from typing import Any

import zstandard

from tests.hostile.cases import Case, cut, f32, grow, put
from tests.hostile.forge import REMOVED, digest
from tests.hostile.tensor_cases import HEAD, NAN

COUNTS = "directory/sections/3/"  # of zstd.rkf: 800 bytes decoded
FRAME = zstandard.ZstdCompressor().compress


def framed(data: bytes) -> dict[str, Any]:
    """Edits that store other frames in the one chunk of the counts."""
    return {"section/3": lambda old: data, COUNTS + "chunks": [len(data)]}


def bare_frame(data: bytes, window: int | None, sized: bool = True, dictionary: int = 0) -> bytes:
    """A frame with one raw block, its header made by hand; window: the descriptor's byte."""
    descriptor = (0x80 if sized else 0) | (0x20 if window is None else 0) | (0x01 if dictionary else 0)
    header = b"\x28\xb5\x2f\xfd" + bytes([descriptor]) + (b"" if window is None else bytes([window]))
    header += bytes([dictionary]) if dictionary else b""
    header += struct.pack("<I", len(data)) if sized else b""
    return header + struct.pack("<I", len(data) << 3 | 1)[:3] + data


ZEROS = bytes(800)
PACKED = [
    Case("1 TiB from 107 bytes", "chunks", "section 3", {COUNTS + "decoded_length": 1 << 40}),
    Case(
        "1 TiB in chunks", "chunks", "section 3", {COUNTS + "decoded_length": 1 << 40, COUNTS + "chunks": [1] * 65536}
    ),
    Case("decoded length 2^63", "chunks", "section 3", {COUNTS + "decoded_length": 1 << 63}),
    Case("a byte more than the shape", "section-extent", "'body'", {COUNTS + "decoded_length": 801}),
    Case("decoded length 0", "chunks", "section 3", {COUNTS + "decoded_length": 0}),
    Case("no chunk", "chunks", "section 3", {COUNTS + "chunks": []}),
    Case("an empty chunk", "chunks", "section 3", {COUNTS + "chunks": [0]}),
    Case("a chunk too many", "chunks", "section 3", {COUNTS + "chunks": [100, 7]}),
    Case("chunks that are not the length", "chunks", "section 3", {COUNTS + "chunks": [106]}),
    Case("a negative chunk", "chunks", "section 3", {COUNTS + "chunks": [-107]}),
    Case("a floating chunk", "chunks", "section 3", {COUNTS + "chunks": [107.0]}),
    Case("chunks missing", "schema", "section 3", {COUNTS + "chunks": REMOVED}),
    Case("raw in name", "schema", "section 3", {COUNTS + "codec": "raw"}),
    Case(
        "shrunk more than 256-fold",
        "chunks",
        "section 11",
        {
            "section/11": lambda old: b"\0",
            **{f"directory/sections/11/{key}": value for key, value in (("chunks", [1]), ("decoded_length", 257))},
        },
    ),
    Case(
        "a blob past 64 MiB",
        "limit",
        "tokenizer.json",
        {
            "section/11": lambda old: bytes(300_000),
            **{
                f"directory/sections/11/{key}": value
                for key, value in (("chunks", [60_000] * 5), ("decoded_length", (64 << 20) + 1))
            },
        },
    ),
    Case("stored hash", "section-hash", "section 3", {COUNTS + "stored_hash": bytes(32)}),
    Case("hash of what is decoded", "section-hash", "section 3", {COUNTS + "hash": bytes(32)}),
    Case("other content", "section-hash", "section 3", framed(FRAME(ZEROS))),
    Case("not a frame", "frame", "section 3", framed(bytes(107))),
    Case("a frame that ends early", "frame", "section 3", {"section/3": cut(1), COUNTS + "chunks": [106]}),
    Case("bytes behind the frame", "frame", "section 3", {"section/3": grow(b"\0"), COUNTS + "chunks": [108]}),
    Case("two frames in a chunk", "frame", "section 3", framed(FRAME(bytes(400)) + FRAME(bytes(400)))),
    Case(
        "an empty frame behind it",
        "frame",
        "section 3",
        {"section/3": lambda old: old + FRAME(b""), COUNTS + "chunks": [107 + len(FRAME(b""))]},
    ),
    Case("a skippable frame", "frame", "section 3", framed(b"\x50\x2a\x4d\x18" + struct.pack("<I", 800) + ZEROS)),
    Case("a frame of more bytes", "frame", "section 3", framed(FRAME(bytes(801)))),
    Case("a frame of 64 MiB", "frame", "section 3", framed(FRAME(bytes(64 << 20)))),
    Case("no content size", "frame", "section 3", framed(bare_frame(ZEROS, 0x58, sized=False))),
    Case("a window of 2^28", "frame", "section 3", framed(bare_frame(ZEROS, 18 << 3))),
    Case("a window of 2^41", "frame", "section 3", framed(bare_frame(ZEROS, 0xF8))),
    Case("a dictionary", "frame", "section 3", framed(bare_frame(ZEROS, None, dictionary=7))),
    Case("a content size that lies", "frame", "section 3", framed(bare_frame(ZEROS, None)[:-1])),
    Case("packed values with a NaN", "centroids", "'body'", {"content/9": put(0, f32(NAN))}),
    Case("packed positions out of range", "exceptions", "'head'", {"content/7": put(12, b"\xd2\0\0\0")}),
    Case("a packed index past K", "rank", "'body'", {"content/0": put(0, b"\xff"), "content/1": put(0, b"\xff")}),
]

ZSTD = [replace(case, source="zstd") for case in PACKED]

MODEL = "directory/metadata/model/"
EMBEDDING, GATE = (
    "directory/tensors/model.embed_tokens.weight/",
    "directory/tensors/model.layers.0.mlp.gate_proj.weight",
)
TOKENIZER = {"model": {"vocab": {"a": 0}}, "added_tokens": []}


def tokenizer(text: bytes) -> dict[str, Any]:
    return {"content/-1": lambda old: text}


MODELS = [
    *(
        Case(f"{key} missing", "model", f"'{key}'", {MODEL + key: REMOVED}, "model")
        for key in (
            "hidden_size",
            "intermediate_size",
            "layers",
            "heads",
            "kv_heads",
            "head_dim",
            "vocab_size",
            "eos_ids",
        )
    ),
    *(
        Case(f"{key} {value}", "model", key, {MODEL + key: value}, "model")
        for key, value in (
            ("hidden_size", 0),
            ("layers", -1),
            ("heads", 4.0),
            ("layers", 1 << 31),
            ("head_dim", 5),
            ("kv_heads", 3),
            ("norm_epsilon", 0),
            ("norm_epsilon", "1e-5"),
            ("rope_theta", -1.0),
            ("bos_id", 40),
            ("bos_id", -1),
            ("eos_ids", [40]),
            ("eos_ids", 2),
            ("add_bos", 1),
            ("generation", {"temperature": "hot"}),
            ("generation", []),
            ("sliding_window", 0),
            ("architecture", 7),
            ("rope_scaling", []),
            ("eos_ids", [0] * 257),
        )
    ),
    Case("model a list", "model", "metadata.model", {"directory/metadata/model": []}, "model"),
    Case("unknown key of the model", "model", "'experts'", {MODEL + "experts": 8}, "model"),
    Case("add_bos without bos_id", "model", "bos_id", {MODEL + "bos_id": REMOVED}, "model"),
    Case("unknown architecture", "architecture", "'mamba'", {MODEL + "architecture": "mamba"}, "model"),
    Case("unknown rope", "architecture", "'yarn'", {MODEL + "rope_scaling": {"type": "yarn"}}, "model"),
    Case(
        "unknown architecture beside unknown keys",
        "architecture",
        "'mamba'",
        {MODEL + "architecture": "mamba", MODEL + "states": 16, MODEL + "heads": REMOVED},
        "model",
    ),
    Case(
        "unknown rope beside unknown keys",
        "architecture",
        "'yarn'",
        {MODEL + "rope_scaling": {"beta": 32, "type": "yarn"}, MODEL + "experts": 8},
        "model",
    ),
    Case("head_dim past every runtime's", "architecture", "head_dim", {MODEL + "head_dim": (1 << 31) - 2}, "model"),
    Case("frequencies past f32", "model", "rope_theta", {MODEL + "rope_theta": 1e-300}, "model"),
    Case("linear rope without factor", "model", "'factor'", {MODEL + "rope_scaling": {"type": "linear"}}, "model"),
    Case("linear rope by 0", "model", "factor", {MODEL + "rope_scaling": {"factor": 0, "type": "linear"}}, "model"),
    Case(
        "llama3 rope upside down",
        "model",
        "low_freq_factor",
        {
            MODEL + "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 1.0,
                "low_freq_factor": 4.0,
                "original_context": 8192,
                "type": "llama3",
            }
        },
        "model",
    ),
    Case("vocabulary not the embedding's rows", "model", "embed_tokens", {MODEL + "vocab_size": 41}, "model"),
    Case("hidden size not the embedding's", "model", "embed_tokens", {MODEL + "hidden_size": 18}, "model"),
    Case("2^31-1 layers", "model", "model.layers.1.", {MODEL + "layers": (1 << 31) - 1}, "model"),
    Case(
        "a tensor missing",
        "model",
        "no such tensor",
        {"directory/tensors/model.norm.weight/name": "model.norm.weight.x"},
        "model",
    ),
    Case(
        "a tensor that no model has",
        "model",
        "rotary",
        {
            "directory/tensors": lambda old: [
                *old,
                {"kind": "alias", "name": "rotary.inv_freq", "target": "model.norm.weight"},
            ]
        },
        "model",
    ),
    Case(
        "a norm of another shape",
        "model",
        "model.norm.weight",
        {"directory/tensors/model.norm.weight/shape": [4, 4]},
        "model",
    ),
    Case(
        "tokenizer missing",
        "model",
        "tokenizer.json",
        {"directory/sections": lambda old: [*old[:-1], old[-1] | {"name": "x-tokenizer"}]},
        "model",
    ),
    Case("tokenizer not JSON", "tokenizer", "tokenizer.json", tokenizer(b"{"), "model"),
    Case("tokenizer not UTF-8", "tokenizer", "tokenizer.json", tokenizer(b'"\xff"'), "model"),
    Case("tokenizer a list", "tokenizer", "tokenizer.json", tokenizer(b"[]"), "model"),
    Case("tokenizer 100,000 deep", "tokenizer", "tokenizer.json", tokenizer(b"[" * 100_000), "model"),
    *(
        Case(f"tokenizer with {what}", "tokenizer", says, tokenizer(text), "model")
        for what, says, text in (
            ("a byte order mark", "tokenizer.json", b"\xef\xbb\xbf" + json.dumps(TOKENIZER).encode()),
            ("another encoding", "tokenizer.json", json.dumps(TOKENIZER).encode("utf-16")),
            ("a NaN", "NaN", b'{"model": {"vocab": {"a": 0}, "unk": NaN}}'),
            ("infinity", "Infinity", b'{"model": {"vocab": {"a": 0}, "unk": -Infinity}}'),
            ("a name twice", "'a' twice", b'{"model": {"vocab": {"a": 0, "b": 1, "a": 2}}}'),
            ("half of a surrogate pair", "surrogates", b'{"model": {"vocab": {"\\ud83d": 0}}}'),
            ("half of a pair in a list", "surrogates", b'{"model": {"vocab": {"a": 0}, "merges": ["\\ude00 x"]}}'),
            ("1.0 as an id", "1.0", b'{"model": {"vocab": {"a": 1.0}}}'),
            ("1e0 as an id", "1.0", b'{"model": {"vocab": {"a": 1e0}}}'),
            ("-0 as an id", "-0.0", b'{"model": {"vocab": {"a": -0}}}'),
            ("true as an id", "True", b'{"model": {"vocab": {"a": true}}}'),
            ("an id of 5,000 digits", "tokenizer.json", b'{"model": {"vocab": {"a": ' + b"1" * 5000 + b"}}}"),
            ("a text as vocabulary", "tokenizer.json", b'{"model": {"vocab": "abc"}}'),
            ("null as added tokens", "tokenizer.json", b'{"model": {"vocab": {"a": 0}}, "added_tokens": null}'),
            ("an added token without id", "'id'", b'{"model": {"vocab": {}}, "added_tokens": [{"content": "a"}]}'),
            ("more listed than the vocabulary", "40", b'{"model": {"vocab": [' + b'["a", 0], ' * 40 + b'["b", 0]]}}'),
        )
    ),
    Case("tokenizer without a vocabulary", "tokenizer", "tokenizer.json", tokenizer(b'{"model": {}}'), "model"),
    Case(
        "id past the vocabulary",
        "tokenizer",
        "40",
        tokenizer(json.dumps(TOKENIZER | {"model": {"vocab": {"a": 40}}}).encode()),
        "model",
    ),
    Case(
        "added id past the vocabulary",
        "tokenizer",
        "40",
        tokenizer(json.dumps(TOKENIZER | {"added_tokens": [{"id": 40, "content": "x"}]}).encode()),
        "model",
    ),
    Case(
        "a negative id",
        "tokenizer",
        "-1",
        tokenizer(json.dumps(TOKENIZER | {"model": {"vocab": {"a": -1}}}).encode()),
        "model",
    ),
    Case(
        "an id of text",
        "tokenizer",
        "tokenizer.json",
        tokenizer(json.dumps(TOKENIZER | {"model": {"vocab": {"a": "0"}}}).encode()),
        "model",
    ),
]

VALUES = [
    Case("order missing", "schema", "'order'", {"directory/order": REMOVED}, "regrouped"),
    Case("unknown order", "schema", "order", {"directory/order": "descending"}, "regrouped"),
    Case("a clustered tensor in a values file", "schema", "kind", {HEAD + "kind": "clustered"}, "regrouped"),
    Case("ranks in a values file", "schema", "'head'", {HEAD + "planes": [0]}, "regrouped"),
    Case("positions in a values file", "schema", "'head'", {HEAD + "exceptions/positions": 0}, "regrouped"),
    Case(
        "a blob in a values file",
        "section-order",
        "blob",
        {"directory/sections/0/kind": "blob", "directory/sections/0/name": "tokenizer.json", "directory/tensors": []},
        "regrouped",
    ),
    Case(
        "centroids out of order in a values file",
        "centroids",
        "'body'",
        {"section/0": put(0, b"\0\0\x80\x3f")},
        "regrouped",
    ),
    Case(
        "a NaN among unordered values",
        "centroids",
        "'body'",
        {"directory/order": "none", "section/0": put(0, f32(NAN))},
        "regrouped",
    ),
    Case(
        "a factor of 0 among unordered values",
        "factors",
        "'body'",
        {"directory/order": "none", "section/0": put(448, f32(0))},
        "regrouped",
    ),
    Case("a model without ranks", "schema", "kind", {"superblock/kind": 1, "directory/order": REMOVED}, "regrouped"),
]

BINDINGS = [
    Case("other ranks", "binding", "ranks", {"directory/ranks_id": digest(b"")}, "regrouped"),
    Case("other dense tensors", "binding", "dense", {"directory/dense_id": digest(b"")}, "regrouped"),
    Case("a tensor of another name", "binding", "'head'", {HEAD + "name": "heads"}, "regrouped"),
    Case("another shape", "binding", "'head'", {HEAD + "shape": [2, 3, 35]}, "regrouped"),
    Case("other tables", "binding", "'head'", {HEAD + "rows_per_table": 5}, "regrouped"),
    Case("fewer exceptions", "binding", "'head'", {HEAD + "exceptions/count": 3, "section/0": cut(4)}, "regrouped"),
    Case(
        "a tensor less",
        "binding",
        "'head'",
        {"directory/tensors/head": REMOVED, "section/0": lambda old: old[:524]},
        "regrouped",
    ),
]
