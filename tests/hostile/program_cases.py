"""Programs that a reader must refuse, by the rules of spec/program.md. See tests/hostile/cases.py.

Sources are vectors. windows: kind 0 has a window and kind 1 none; kind 2, the last layer, shares the cache of layer 0.
plain: kinds 0, 1, 0. experts: kinds 0, 1, 2. recurrent: kinds 0 (delta), 0, 1 (conv), 2 (attention).
latent: kind 0 twice.
scan: kinds 0, 0, 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.hostile.cases import Case
from tests.hostile.forge import REMOVED

MODEL = "directory/metadata/model/"
PROGRAM = MODEL + "program/"
FIRST, TOP, STEM = PROGRAM + "kinds/0/", PROGRAM + "top/", PROGRAM + "stem/"
ATTENTION, SHARING = FIRST + "6/", PROGRAM + "kinds/2/3/"  # of windows
SIZE_MAX = (1 << 31) - 1
ADD = {"a": "x", "b": "x", "dst": "x", "op": "add"}
NAN = float("nan")


def op(name: str, **keys: Any) -> dict[str, Any]:
    return dict(sorted({"op": name, **keys}.items()))


def shared(layer: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """An attention that reads the cache of a layer in place of its own."""
    return lambda old: op(
        **{key: value for key, value in old.items() if key not in ("k", "v", "op")}, shares=layer, name="attention"
    )


def insert(at: int, *ops: dict[str, Any]) -> Callable[[list[Any]], list[Any]]:
    return lambda old: [*old[:at], *ops, *old[at:]]


def hadamard(block: int) -> dict[str, Any]:
    return op("hadamard", src="x", dst="x", block=block)


def windows(name: str, refusal: str, mentions: str, edits: dict[str, Any], large: bool = False) -> Case:
    return Case(name, refusal, mentions, edits, "windows", large)


def plain(name: str, refusal: str, mentions: str, edits: dict[str, Any], large: bool = False) -> Case:
    return Case(name, refusal, mentions, edits, "plain", large)


def experts(name: str, refusal: str, mentions: str, edits: dict[str, Any]) -> Case:
    return Case(name, refusal, mentions, edits, "experts")


def latent(name: str, refusal: str, mentions: str, edits: dict[str, Any]) -> Case:
    return Case(name, refusal, mentions, edits, "latent")


def recurrent(name: str, refusal: str, mentions: str, edits: dict[str, Any]) -> Case:
    return Case(name, refusal, mentions, edits, "recurrent")


def scan(name: str, refusal: str, mentions: str, edits: dict[str, Any]) -> Case:
    return Case(name, refusal, mentions, edits, "scan")


WORDS = [
    windows("op of a layer", "word", "'warp'", {FIRST + "0/op": "warp"}),
    windows("op of the stem", "word", "'warp'", {STEM + "0/op": "warp"}),
    windows("op of the top", "word", "'warp'", {TOP + "1/op": "warp"}),
    windows("activation", "word", "'mish'", {FIRST + "12/act": "mish"}),
    windows("pairs", "word", "'thirds'", {FIRST + "4/pairs": "thirds"}),
    experts("score", "word", "'linear'", {FIRST + "10/score": "linear"}),
    windows(
        "op beside unknown keys of every map",
        "word",
        "'warp'",
        {FIRST + "0/op": "warp", PROGRAM + "new": 1, MODEL + "new": 1, FIRST + "1/new": 1, PROGRAM + "ropes": 7},
    ),
    windows(
        "activation beside a missing key",
        "word",
        "'mish'",
        {FIRST + "12/act": "mish", FIRST + "0/epsilon": REMOVED, MODEL + "add_bos": REMOVED},
    ),
]

FORMS = [
    windows("bit 2 without a model", "form", "a model", {"directory/metadata/model": REMOVED}),
    windows("a model that is a list", "form", "metadata.model", {"directory/metadata/model": []}),
    windows("no program", "form", "'program'", {MODEL + "program": REMOVED}),
    windows("unknown key of the model", "form", "'heads'", {MODEL + "heads": 4}),
    windows("a program that is a list", "form", "program", {MODEL + "program": []}),
    windows("unknown key of a program", "form", "'loops'", {PROGRAM + "loops": 2}),
    *(
        windows(f"no {key}", "form", f"'{key}'", {PROGRAM + key: REMOVED})
        for key in ("stem", "kinds", "order", "ropes", "top")
    ),
    *(
        windows(f"{key} that is a map", "form", key, {PROGRAM + key: {}})
        for key in ("stem", "kinds", "order", "ropes", "top")
    ),
    windows("a kind that is a map", "form", "kind 0", {PROGRAM + "kinds/0": {}}),
    windows("an op that is a list", "form", "op 0", {FIRST + "0": []}),
    windows("an op without a name", "form", "'op'", {FIRST + "0/op": REMOVED}),
    windows("an op whose name is a number", "form", "op", {FIRST + "0/op": 7}),
    windows("a missing key", "form", "'epsilon'", {FIRST + "0/epsilon": REMOVED}),
    windows("an unknown key", "form", "'heads'", {FIRST + "0/heads": 4}),
    windows("a value without a name", "form", "dst", {FIRST + "0/dst": ""}),
    windows("a value with a control character", "form", "dst", {FIRST + "0/dst": "h\n"}),
    windows("a tensor that is a number", "form", "weight", {FIRST + "1/weight": 3}),
    windows("a size of 0", "form", "rows", {FIRST + "1/rows": 0}),
    windows("a size of 2^31", "form", "rows", {FIRST + "1/rows": SIZE_MAX + 1}),
    windows("a size of 2^64-1", "form", "rows", {FIRST + "1/rows": (1 << 64) - 1}),
    windows("a negative size", "form", "rows", {FIRST + "1/rows": -1}),
    windows("a size that is a float", "form", "rows", {FIRST + "1/rows": 24.0}),
    windows("a size that is true", "form", "window", {ATTENTION + "window": True}),
    windows("a number that is a string", "form", "scale", {ATTENTION + "scale": "0.5"}),
    windows(
        "a number past f32", "form", "factor", {PROGRAM + "kinds/0/8/scale": 1e39, PROGRAM + "ropes/1/factor": 1e39}
    ),
    windows("an epsilon of 0", "form", "epsilon", {FIRST + "0/epsilon": 0}),
    windows("an epsilon that is no normal f32", "form", "epsilon", {FIRST + "0/epsilon": 1e-40}),
    windows("a negative softcap", "form", "softcap", {ATTENTION + "softcap": -1.0}),
    windows("a flag that is 1", "form", "by_layer", {FIRST + "16/by_layer": 1}),
    windows("a word that is a number", "form", "act", {FIRST + "12/act": 3}),
    windows("a rope past the ropes", "form", "table", {FIRST + "4/table": 2}),
    windows("a negative rope", "form", "table", {FIRST + "4/table": -1}),
    windows("a shared layer past all", "form", "shares", {SHARING + "shares": 4096}),
    windows("an order past the kinds", "form", "order", {PROGRAM + "order": [0, 1, 0, 3]}),
    windows("a negative order", "form", "order", {PROGRAM + "order": [0, 1, -1, 2]}),
    windows("an order of floats", "form", "order", {PROGRAM + "order": [0.0, 1.0, 0.0, 2.0]}),
    windows("a kind without a layer", "form", "every kind", {PROGRAM + "order": [0, 1, 0, 1]}),
    windows("no layers", "form", "at least one layer", {PROGRAM + "order": [], PROGRAM + "kinds": []}),
    windows("an empty kind", "form", "kind 3", {PROGRAM + "kinds": insert(3, []), PROGRAM + "order": [0, 1, 0, 3, 2]}),
    windows("an empty stem", "form", "stem", {PROGRAM + "stem": []}),
    windows("an empty top", "form", "top", {PROGRAM + "top": []}),
    windows("4097 layers", "form", "order", {PROGRAM + "order": [0, 1, 0, *[2] * 4094]}),
    windows("4097 ops", "form", "4096", {PROGRAM + "kinds/0": insert(8, *[ADD] * 4097)}),
    windows("half a million ops", "form", "4096", {PROGRAM + "kinds/0": [op("add")] * 500_000}, large=True),
    windows("257 ropes", "form", "ropes", {PROGRAM + "ropes": [{"frequencies": [1.0]}] * 257}),
    windows("a rope that is a list", "form", "rope 0", {PROGRAM + "ropes/0": [1.0]}),
    windows("an unknown key of a rope", "form", "'kind'", {PROGRAM + "ropes/0/kind": "dynamic"}),
    windows("a rope without frequencies", "form", "frequencies", {PROGRAM + "ropes/0/frequencies": []}),
    windows("4097 frequencies", "form", "frequencies", {PROGRAM + "ropes/0/frequencies": [1.0] * 4097}),
    windows("a negative frequency", "form", "frequencies", {PROGRAM + "ropes/0/frequencies/1": -0.5}),
    windows("a frequency that is a string", "form", "frequencies", {PROGRAM + "ropes/0/frequencies/1": "1"}),
    windows("a frequency past f32", "form", "frequencies", {PROGRAM + "ropes/0/frequencies/1": 1e300}),
    windows("long without a context", "form", "original_context", {PROGRAM + "ropes/1/original_context": REMOVED}),
    windows("a context without long", "form", "original_context", {PROGRAM + "ropes/0/original_context": 16}),
    windows("long of another length", "form", "long", {PROGRAM + "ropes/1/long": [0.5, 0.1]}),
    windows("a rope's factor of 0", "form", "factor", {PROGRAM + "ropes/1/factor": 0.0}),
    windows("no context length", "form", "context_length", {MODEL + "context_length": 0}),
    windows("add_bos alone", "form", "bos_id", {MODEL + "bos_id": REMOVED}),
    windows("an end token past the logits", "form", "eos_ids", {MODEL + "eos_ids": [24]}),
    windows("257 end tokens", "form", "eos_ids", {MODEL + "eos_ids": [1] * 257}),
    windows("a family of no letters", "form", "family", {MODEL + "family": ""}),
    windows("generation of text", "form", "temperature", {MODEL + "generation/temperature": "hot"}),
    windows("special tokens in a list", "form", "special_tokens", {MODEL + "special_tokens": []}),
    windows("a special token of no text", "form", "'text'", {MODEL + "special_tokens/bos_token/text": REMOVED}),
    windows("a special token that is an id", "form", "text", {MODEL + "special_tokens/bos_token/text": 1}),
    windows("a special token past the logits", "form", "bos_token", {MODEL + "special_tokens/bos_token/id": 24}),
    windows("unknown key of a special token", "form", "'kind'", {MODEL + "special_tokens/bos_token/kind": 1}),
    windows(
        "4097 special tokens",
        "form",
        "4096",
        {MODEL + "special_tokens": {f"t{n:04}": {"text": "t"} for n in range(4097)}},
    ),
    windows("NaN as a frequency", "canonical", "canonical number", {PROGRAM + "ropes/0/frequencies/1": NAN}),
    windows("infinity as an epsilon", "canonical", "canonical number", {FIRST + "0/epsilon": float("inf")}),
    windows("deeper than 8", "canonical", "deep", {FIRST + "0/x-deep": [[]]}),
    windows("a million ops", "limit", "maps", {PROGRAM + "kinds/0": [op("add")] * 1_000_000}, large=True),
    windows(
        "five million frequencies", "limit", "values", {PROGRAM + "ropes/0/frequencies": [1] * 5_000_000}, large=True
    ),
]

FLOWS = [
    windows("read before it is written", "flow", "'later'", {FIRST + "1/src": "later"}),
    windows("read from another layer", "flow", "'f'", {PROGRAM + "kinds/2/4/src": "f"}),
    windows("a layer's value in the top", "flow", "'h'", {TOP + "0/src": "h"}),
    windows("a layer's value in the stem", "flow", "'h'", {STEM + "2/src": "h"}),
    windows("read by itself alone", "flow", "'y'", {PROGRAM + "kinds/0": insert(8, op("scale", dst="y", src="y"))}),
    windows("never read", "flow", "'y'", {PROGRAM + "kinds/0": insert(8, op("scale", dst="y", src="x"))}),
    windows("never read, in the stem", "flow", "'y'", {PROGRAM + "stem": insert(1, op("scale", dst="y", src="x"))}),
    windows("never read, in the top", "flow", "'y'", {PROGRAM + "top": insert(1, op("scale", dst="y", src="x"))}),
    windows("written twice", "flow", "'h'", {PROGRAM + "kinds/0": insert(1, op("scale", dst="h", src="x"))}),
    windows(
        "embed in a layer",
        "flow",
        "embed",
        {PROGRAM + "kinds/0": insert(0, op("embed", dst="x", table="t", rows=24, cols=12))},
    ),
    windows(
        "attention in the top",
        "flow",
        "attention",
        {
            PROGRAM + "top": insert(
                0,
                op(
                    "attention", dst="x", q="x", k="x", v="x", heads=1, kv_heads=1, head_dim=12, value_dim=12, scale=1.0
                ),
            )
        },
    ),
    scan(
        "scan in the top",
        "flow",
        "scan",
        {
            PROGRAM + "top": insert(
                0,
                op(
                    "scan",
                    **{"dst": "x", "src": "x", "dt": "x", "a_log": "a", "dt_bias": "b", "d": "d"},
                    **{"heads": 12, "head_dim": 1, "groups": 1, "state_dim": 1},
                ),
            )
        },
    ),
    windows(
        "conv in the stem",
        "flow",
        "conv",
        {PROGRAM + "stem": insert(1, op("conv", dst="x", src="x", weight="w", taps=2))},
    ),
    windows(
        "an input by layer in the top",
        "flow",
        "gate",
        {PROGRAM + "top": insert(0, op("gate", dst="x", a="x", b="inputs", act="relu", by_layer=True))},
    ),
    windows("no logits", "flow", "logits", {TOP + "1": op("scale", dst="logits", src="h")}),
    windows("logits twice", "flow", "logits", {PROGRAM + "top": lambda old: [*old, old[-1] | {"dst": "more"}]}),
    windows(
        "logits not at the end",
        "flow",
        "logits",
        {PROGRAM + "top": lambda old: [*old, op("scale", dst="y", src="logits")]},
    ),
    windows(
        "logits in a layer",
        "flow",
        "logits",
        {PROGRAM + "kinds/0": insert(8, op("logits", dst="y", src="x", weight="w", rows=24))},
    ),
]

WIDTHS = [
    windows("sums of two widths", "width", "'add'", {PROGRAM + "kinds/0/7/rows": 13}),
    windows("gate of two widths", "width", "'gate'", {FIRST + "10/rows": 21}),
    windows("queries too few", "width", "'q'", {FIRST + "1/rows": 12}),
    windows("keys too many", "width", "'k'", {FIRST + "2/rows": 18}),
    windows("heads that groups do not divide", "width", "multiple of 3", {ATTENTION + "kv_heads": 3}),
    windows("head_dim that does not divide", "width", "head_dim", {FIRST + "4/head_dim": 7}),
    windows("more turned than a head has", "width", "turned", {FIRST + "4/head_dim": 4}),
    windows("a group that does not divide", "width", "group", {STEM + "3/group": 5}),
    windows("a block that is no power of two", "width", "power of two", {PROGRAM + "stem": insert(1, hadamard(3))}),
    windows("a block that does not divide", "width", "divides 12", {PROGRAM + "stem": insert(1, hadamard(8))}),
    windows("keys without values", "width", "k and v", {ATTENTION + "v": REMOVED}),
    windows("neither keys nor a layer", "width", "shares", {SHARING + "shares": REMOVED}),
    windows("keys and a layer", "width", "shares", {PROGRAM + "kinds/1/6/shares": 0}),
    windows("half a temperature", "width", "temperature", {PROGRAM + "kinds/1/6/temperature_beta": REMOVED}),
    windows("a window and a chunk", "width", "a window or a chunk", {ATTENTION + "chunk": 4}),
    windows("an offset without a temperature", "width", "temperature_length", {ATTENTION + "temperature_offset": 1}),
    windows("an input of another width", "width", "'inputs'", {FIRST + "15/rows": 5, FIRST + "17/src": "g"}),
    windows("an input by layer of nothing", "width", "b, as by_layer", {FIRST + "16/b": REMOVED}),
    windows("fewer rows than logits", "width", "rows", {STEM + "0/rows": 23}),
    windows(
        "a stem's value of another width",
        "width",
        "as the stem writes",
        {
            PROGRAM + "kinds/0/13/dst": "x",
            PROGRAM + "kinds/0/13/rows": 13,
            PROGRAM + "kinds/0": insert(14, op("scale", dst="d", src="x")),
        },
    ),
    windows(
        "a width of 2^62",
        "width",
        "at most 2147483647",
        {
            FIRST + "1/rows": SIZE_MAX,
            FIRST + "2/rows": 1,
            FIRST + "3/rows": SIZE_MAX,
            FIRST + "4": op("scale", dst="q", src="q"),
            FIRST + "5": op("scale", dst="k", src="k"),
            ATTENTION + "heads": SIZE_MAX,
            ATTENTION + "kv_heads": 1,
            ATTENTION + "head_dim": 1,
            ATTENTION + "value_dim": SIZE_MAX,
        },
    ),
    experts("more chosen than there are", "width", "count", {FIRST + "10/count": 7}),
    experts("groups that do not divide", "width", "groups", {PROGRAM + "kinds/1/10/groups": 4}),
    experts("groups of one expert", "width", "at least two experts", {PROGRAM + "kinds/1/10/groups": 6}),
    experts("more groups than there are", "width", "top_groups", {PROGRAM + "kinds/1/10/top_groups": 4}),
    experts("more chosen than the groups have", "width", "top_groups", {PROGRAM + "kinds/1/10/top_groups": 1}),
    experts("half of the groups", "width", "groups", {PROGRAM + "kinds/1/10/top_groups": REMOVED}),
    experts("chosen experts as a vector", "width", "a vector", {FIRST + "11/src": "r"}),
    experts("a vector as chosen experts", "width", "chosen experts", {FIRST + "11/route": "h"}),
    recurrent("value heads that keys do not divide", "width", "multiple of 3", {FIRST + "6/key_heads": 3}),
    recurrent("a delta of another width", "width", "'c'", {FIRST + "6/key_dim": 4}),
    recurrent("a decay of another width", "width", "'a'", {FIRST + "3/rows": 5}),
    scan("heads that groups of B do not divide", "width", "multiple of 3", {FIRST + "5/groups": 3}),
    scan("a scan of another width", "width", "'c'", {FIRST + "5/state_dim": 4}),
    scan("a step of another width", "width", "'t'", {FIRST + "3/rows": 5}),
    scan("limits out of order", "width", "dt_min", {FIRST + "5/dt_max": 0.5}),
    scan("a step that is negative", "width", "dt_min", {FIRST + "5/dt_min": -0.5}),
    scan("weights by group without groups", "width", "by_group", {FIRST + "7/group": REMOVED}),
]

PARTS, JOIN, XIELU = FIRST + "6/", FIRST + "9/", FIRST + "17/"  # of latent

WIDTHS += [
    latent("parts that do not divide", "width", "parts that divide 20", {PARTS + "parts": 3}),
    latent("heads that do not divide", "width", "heads that divide 24", {JOIN + "heads": 5}),
    latent("xielu without a number", "width", "'xielu'", {XIELU + "eps": REMOVED}),
    latent("xielu of two values", "width", "no b", {XIELU + "b": "u"}),
    latent("numbers of another act", "width", "'xielu' alone", {XIELU + "act": "relu"}),
    experts("xielu in experts", "width", "another act", {FIRST + "11/act": "xielu"}),
    recurrent("xielu in a convolution", "width", "another act", {FIRST + "5/act": "xielu"}),
]

CACHES = [
    windows("a cache of its own layer", "cache", "before 3", {SHARING + "shares": 3}),
    windows("a cache of a later layer", "cache", "before 3", {SHARING + "shares": 7}),
    windows("a layer that shares first", "cache", "before 0", {PROGRAM + "order": [2, 0, 0, 1]}),
    windows("a cache of another shape", "cache", "kv_heads", {SHARING + "kv_heads": 1}),
    windows("a wider window than is kept", "cache", "window", {SHARING + "window": 5}),
    windows("no window where one is kept", "cache", "window", {SHARING + "window": REMOVED}),
    windows(
        "a cache of a layer that shares",
        "cache",
        "has a cache",
        {
            PROGRAM + "kinds/0/6": shared(0),
            PROGRAM + "kinds/0": lambda old: [*old[:2], old[4], *old[6:]],
            PROGRAM + "order": [1, 0, 0, 2],
            SHARING + "shares": 1,
        },
    ),
    recurrent(
        "a cache of a layer without one",
        "cache",
        "has a cache",
        {
            PROGRAM + "kinds/2/7": shared(0),
            PROGRAM + "kinds/2": lambda old: [item for item in old if item["dst"] not in ("k", "v")],
        },
    ),
    windows(
        "two caches in a layer",
        "cache",
        "attention",
        {
            PROGRAM + "kinds/0": lambda old: [
                *old[:7],
                op("scale", dst="a", src="a"),
                op("scale", dst="q", src="a"),
                old[6],
                *old[7:],
            ]
        },
    ),
    recurrent(
        "two convolutions in a layer", "cache", "conv", {PROGRAM + "kinds/0": lambda old: [*old[:6], old[5], *old[6:]]}
    ),
    recurrent(
        "two deltas in a layer",
        "cache",
        "delta",
        {
            PROGRAM + "kinds/0": lambda old: [
                *old[:7],
                old[6] | {"dst": "w"},
                op("add", dst="y", a="y", b="w"),
                *old[7:],
            ]
        },
    ),
    scan(
        "two scans in a layer",
        "cache",
        "scan",
        {
            PROGRAM + "kinds/0": lambda old: [
                *old[:6],
                old[5] | {"dst": "w"},
                op("add", dst="y", a="y", b="w"),
                *old[6:],
            ]
        },
    ),
]

TENSORS = [
    windows("a tensor that is not there", "tensors", "'model.layers.0.attn.other'", {FIRST + "1/weight": "attn.other"}),
    windows(
        "a prefix in a layer",
        "tensors",
        "stands twice: names in layers are relative",
        {FIRST + "1/weight": "model.layers.0.attn.q.weight"},
    ),
    plain("a layer that is not there", "tensors", "'model.layers.3.", {PROGRAM + "order": [0, 1, 0, 0]}),
    plain("4096 layers that are not there", "tensors", "'model.layers.3.", {PROGRAM + "order": [0, 1, *[0] * 4094]}),
    plain("a layer too many", "tensors", "tensors of 2 layers, as many as order has", {PROGRAM + "order": [0, 1]}),
    plain("another shape", "tensors", "[21, 12]", {PROGRAM + "kinds/1/6/rows": 21}),
    plain("a head's bias of another length", "tensors", "one shape, [12], got [24]", {TOP + "1/bias": "norm.weight"}),
    plain("two shapes of one name", "tensors", "one shape", {FIRST + "2/weight": "attn.q.weight"}),
    plain(
        "a name of the top in a layer", "tensors", "'model.layers.0.head.weight'", {FIRST + "1/weight": "head.weight"}
    ),
    plain("a name as long as may be", "tensors", "no such tensor", {FIRST + "1/weight": "w" * 255}),
    plain(
        "stacks of 2^93 weights",
        "tensors",
        "no such tensor",
        {
            PROGRAM + "top": insert(
                0,
                op("route", dst="r", src="x", weight="r", experts=SIZE_MAX, count=1, score="softmax"),
                op(
                    "experts",
                    dst="x",
                    src="x",
                    route="r",
                    gate="g",
                    up="u",
                    down="d",
                    inner=SIZE_MAX,
                    rows=12,
                    act="silu",
                ),
            )
        },
    ),
    scan("weights by group of another shape", "tensors", "[5]", {FIRST + "7/group": 5, FIRST + "7/by_group": False}),
    plain("no tokenizer", "tensors", "tokenizer.json", {"keep/-2": None}),
]

PROGRAMS = [*WORDS, *FORMS, *FLOWS, *WIDTHS, *CACHES, *TENSORS]
