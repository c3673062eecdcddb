"""Small models that carry their program, by spec/program.md: all ops, and every key of them, in ten files.

Programs are maps, as they stand in a file. Logits come from reference_program.py, in f64.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import reference_program
from golden import Golden, clustered, from_f32, to_f32, uniform

from rkf.format.matrix import DenseTensor
from rkf.model.op import EMBEDDING, MATRIX, STACK
from rkf.model.program import Program

Map = dict[str, Any]

VOCABULARY, HIDDEN = 24, 12
TOKENS = [1, 7, 3, 14, 15, 9, 2, 6, 5, 3, 23, 11]
ROPE = {"frequencies": [1.0, 0.1, 0.01]}


def op(name: str, dst: str, **keys: Any) -> Map:
    return {"op": name, "dst": dst, **keys}


def linear(src: str, dst: str, name: str, rows: int, bias: bool = False) -> Map:
    biased = {"bias": f"{name}.bias"} if bias else {}
    return op("linear", dst, src=src, weight=f"{name}.weight", rows=rows, **biased)


def norm(src: str, dst: str, name: str, **keys: Any) -> Map:
    return op("norm", dst, src=src, weight=f"{name}.weight", epsilon=1e-5, **keys)


def attention(**keys: Any) -> Map:
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 6, "value_dim": 6, "scale": 0.25}
    return op("attention", "a", q="q", **(shape | keys))


def qkv(src: str, value_dim: int = 6, bias: bool = False) -> list[Map]:
    rows = {"q": 24, "k": 12, "v": 2 * value_dim}
    return [linear(src, part, f"attn.{part}", rows[part], bias) for part in "qkv"]


def ropes(table: int = 0, of: str = "qk", **keys: Any) -> list[Map]:
    return [op("rope", part, src=part, table=table, head_dim=6, **keys) for part in of]


def feed_forward(src: str, act: str, **keys: Any) -> list[Map]:
    return [
        linear(src, "g", "mlp.gate", 20),
        linear(src, "u", "mlp.up", 20),
        op("gate", "f", a="g", b="u", act=act, **keys),
        linear("f", "d", "mlp.down", HIDDEN),
    ]


def embed(**keys: Any) -> Map:
    return op("embed", "x", table="embed.weight", rows=VOCABULARY, cols=HIDDEN, **keys)


def head(**keys: Any) -> Map:
    return op("logits", "logits", src="h", weight="head.weight", rows=VOCABULARY, **keys)


def plain() -> Map:
    """Pre-norms, partial rope of neighbours, biases; a second kind without rope or gate; scales of all sorts."""
    with_rope = [
        norm("x", "h", "norm_1"),
        *qkv("h", bias=True),
        *ropes(pairs="neighbours"),
        attention(k="k", v="v"),
        linear("a", "o", "attn.o", HIDDEN, bias=True),
        op("add", "x", a="x", b="o", scale=0.5),
        norm("x", "h", "norm_2"),
        *feed_forward("h", "silu"),
        op("add", "x", a="x", b="d", scale=0.5),
    ]
    without = [
        norm("x", "h", "norm_1"),
        *qkv("h", value_dim=5),
        attention(k="k", v="v", value_dim=5),
        linear("a", "o", "attn.o", HIDDEN),
        linear("h", "u", "mlp.up", 20, bias=True),
        op("gate", "m", a="u", act="gelu"),
        linear("m", "d", "mlp.down", HIDDEN, bias=True),
        op("add", "o", a="o", b="d"),
        op("add", "x", a="x", b="o"),
    ]
    return {
        "stem": [embed(scale=1.5)],
        "kinds": [with_rope, without],
        "order": [0, 1, 0],
        "ropes": [{"frequencies": [1.0, 0.1]}],
        "top": [norm("x", "h", "norm"), head(scale=0.5)],
    }


def post_norms() -> Map:
    """Norms behind the branches, over the whole width and by head, with means removed, offsets; clips; a tied head."""
    layer = [
        *qkv("x"),
        norm("q", "q", "attn.q_norm"),
        norm("k", "k", "attn.k_norm", group=6, offset=1.0),
        op("norm", "v", src="v", epsilon=1e-6, group=6),
        *(op("clip", part, src=part, limit=1.25) for part in "qkv"),
        *ropes(),
        attention(k="k", v="v"),
        linear("a", "o", "attn.o", HIDDEN),
        norm("o", "o", "norm_1", centred=True, bias="norm_1.bias"),
        op("add", "x", a="x", b="o"),
        linear("x", "u", "mlp.up", 20),
        op("gate", "m", a="u", act="relu2"),
        linear("m", "d", "mlp.down", HIDDEN),
        norm("d", "d", "norm_2", centred=True),
        op("add", "x", a="x", b="d"),
        op("scale", "x", src="x", factor=0.75, weight="scale"),
    ]
    return {
        "stem": [embed(), norm("x", "x", "embed_norm", centred=True, bias="embed_norm.bias")],
        "kinds": [layer],
        "order": [0, 0],
        "ropes": [ROPE],
        "top": [norm("x", "h", "norm", offset=1.0), head() | {"weight": "embed.weight"}],
    }


def windows() -> Map:
    """Windows, sinks, softcaps, temperature, two ropes of which one is long, a shared cache, an input by layer."""
    by_layer = [
        linear("x", "g", "input.gate", 4),
        op("gate", "g", a="g", b="inputs", act="gelu_tanh", by_layer=True),
        linear("g", "d", "input.out", HIDDEN),
        op("add", "x", a="x", b="d"),
    ]
    rest = [
        linear("a", "o", "attn.o", HIDDEN),
        op("add", "x", a="x", b="o"),
        norm("x", "h", "norm_2"),
        *feed_forward("h", "gelu_tanh"),
        op("add", "x", a="x", b="d"),
        *by_layer,
    ]
    sliding = [
        norm("x", "h", "norm_1"),
        *qkv("h"),
        *ropes(0),
        attention(k="k", v="v", window=4, softcap=2.0, sinks="attn.sinks"),
        *rest,
    ]
    full = [
        norm("x", "h", "norm_1"),
        *qkv("h"),
        *ropes(1),
        attention(k="k", v="v", temperature_beta=0.5, temperature_length=3),
        *rest,
    ]
    shares = {"window": 3, "shares": 0}
    sharing = [norm("x", "h", "norm_1"), linear("h", "q", "attn.q", 24), *ropes(0, of="q"), attention(**shares), *rest]
    long = {"frequencies": [0.9, 0.2, 0.05], "factor": 1.1, "long": [0.5, 0.1, 0.01], "original_context": 16}
    return {
        "stem": [
            embed(),
            op("embed", "inputs", table="inputs.weight", rows=VOCABULARY, cols=16, scale=2.0),
            linear("x", "projected", "inputs.projection", 16),
            norm("projected", "projected", "inputs.norm", group=4),
            op("add", "inputs", a="projected", b="inputs", scale=0.5),
        ],
        "kinds": [sliding, full, sharing],
        "order": [0, 1, 0, 2],
        "ropes": [ROPE, long],
        "top": [norm("x", "h", "norm"), head(softcap=8.0)],
    }


def mixture() -> Map:
    """Experts by softmax beside a shared one that a single number gates, by sigmoid in groups, by the chosen logits."""
    stacks = {key: f"experts.{key}" for key in ("gate", "up", "down")}
    biases = {f"{key}_bias": f"experts.{key}.bias" for key in ("gate", "up", "down")}
    sizes = {"inner": 10, "rows": HIDDEN}
    attends = [
        norm("x", "h", "norm_1"),
        *qkv("h"),
        *ropes(),
        attention(k="k", v="v"),
        linear("a", "o", "attn.o", HIDDEN),
        op("add", "x", a="x", b="o"),
        norm("x", "h", "norm_2"),
    ]
    router = {"src": "h", "weight": "router.weight"}
    shared = [
        op("route", "r", **router, experts=6, count=2, score="softmax", normalise=True, floor=0.75, scale=1.5),
        op("experts", "m", src="h", route="r", **stacks, **sizes, act="silu"),
        *feed_forward("h", "relu"),
        linear("h", "s", "shared_gate", 1),
        op("gate", "d", a="s", b="d", act="sigmoid"),
        op("add", "m", a="m", b="d"),
    ]
    groups = {"groups": 3, "top_groups": 2, "select": "router.select", "expert_scale": "router.expert_scale"}
    grouped = [
        op("route", "r", **router, experts=6, count=3, score="sigmoid", **groups, normalise=True, add=0.125),
        op("experts", "m", src="h", route="r", **stacks, **sizes, act="gelu_tanh", scale_input=True),
    ]
    limited = {"limit": 0.75, "alpha": 1.702, "shift": 1.0}
    chosen = [
        op("route", "r", **router, bias="router.bias", experts=6, count=2, score="chosen"),
        op("experts", "m", src="h", route="r", **stacks, **biases, **sizes, act="silu", **limited),
    ]
    return {
        "stem": [embed()],
        "kinds": [[*attends, *kind, op("add", "x", a="x", b="m")] for kind in (shared, grouped, chosen)],
        "order": [0, 1, 2],
        "ropes": [ROPE],
        "top": [norm("x", "h", "norm"), head()],
    }


def recurrent() -> Map:
    """The delta rule behind a convolution, a short convolution between gates, and attention with a gate behind it."""
    mlp = [norm("x", "h", "norm_2"), *feed_forward("h", "silu"), op("add", "x", a="x", b="d")]
    delta = [
        norm("x", "h", "norm_1"),
        linear("h", "c", "delta.qkv", 2 * 2 * 3 + 4 * 5),
        linear("h", "z", "delta.z", 20),
        linear("h", "a", "delta.a", 4),
        linear("h", "b", "delta.b", 4),
        op("conv", "c", src="c", weight="delta.conv", taps=4, act="silu"),
        op(
            "delta", "y", src="c", a="a", b="b", a_log="delta.a_log", dt_bias="delta.dt_bias",
            key_heads=2, value_heads=4, key_dim=3, value_dim=5,
        ),
        norm("y", "y", "delta.norm", group=5),
        op("gate", "y", a="z", b="y", act="silu"),
        linear("y", "o", "delta.o", HIDDEN),
        op("add", "x", a="x", b="o"),
        *mlp,
    ]  # fmt: skip
    short = [
        norm("x", "h", "norm_1"),
        *(linear("h", part, f"conv.{part}", HIDDEN) for part in ("before", "behind", "v")),
        op("gate", "v", a="before", b="v", act="identity"),
        op("conv", "v", src="v", weight="conv.weight", taps=3, bias="conv.bias"),
        op("gate", "v", a="behind", b="v", act="identity"),
        linear("v", "o", "conv.o", HIDDEN),
        op("add", "x", a="x", b="o"),
        *mlp,
    ]
    full = [
        norm("x", "h", "norm_1"),
        *qkv("h"),
        linear("h", "s", "attn.gate", 24),
        *ropes(),
        attention(k="k", v="v"),
        op("gate", "a", a="s", b="a", act="sigmoid"),
        linear("a", "o", "attn.o", HIDDEN),
        op("add", "x", a="x", b="o"),
        *mlp,
    ]
    return {
        "stem": [embed()],
        "kinds": [delta, short, full],
        "order": [0, 0, 1, 2],
        "ropes": [ROPE],
        "top": [norm("x", "h", "norm"), head()],
    }


def scans() -> Map:
    """The mixer of Mamba 2 in groups, its steps limited; and one without limits, beside attention with normed heads."""
    mixer = [
        norm("x", "h", "norm_1"),
        linear("h", "z", "mixer.z", 20),
        linear("h", "c", "mixer.xbc", 4 * 5 + 2 * 2 * 3),
        linear("h", "t", "mixer.dt", 4),
        op("conv", "c", src="c", weight="mixer.conv", bias="mixer.conv.bias", taps=4, act="silu"),
        op(
            "scan", "y", src="c", dt="t", a_log="mixer.a_log", dt_bias="mixer.dt_bias", d="mixer.d",
            heads=4, head_dim=5, groups=2, state_dim=3, dt_min=0.75, dt_max=1.5,
        ),
        op("gate", "y", a="z", b="y", act="silu"),
        norm("y", "y", "mixer.norm", group=10, by_group=True),
        linear("y", "o", "mixer.o", HIDDEN),
        op("add", "x", a="x", b="o"),
    ]  # fmt: skip
    heads = {"group": 6, "by_group": True, "centred": True, "offset": 0.5}
    both = [
        norm("x", "h", "norm_1"),
        linear("h", "c", "mixer.xbc", 3 * 4 + 2 * 18),
        linear("h", "t", "mixer.dt", 3, bias=True),
        op(
            "scan", "y", src="c", dt="t", a_log="mixer.a_log", dt_bias="mixer.dt_bias", d="mixer.d",
            heads=3, head_dim=4, groups=1, state_dim=18,
        ),
        norm("y", "y", "mixer.norm"),
        *qkv("h"),
        *(norm(part, part, f"attn.{part}_norm", bias=f"attn.{part}_norm.bias", **heads) for part in "qk"),
        *ropes(),
        attention(k="k", v="v"),
        linear("a", "o", "attn.o", HIDDEN),
        op("add", "o", a="o", b="y"),
        op("add", "x", a="x", b="o"),
        norm("x", "h", "norm_2"),
        *feed_forward("h", "silu"),
        op("add", "x", a="x", b="d"),
    ]  # fmt: skip
    return {
        "stem": [embed()],
        "kinds": [mixer, both],
        "order": [0, 0, 1],
        "ropes": [ROPE],
        "top": [norm("x", "h", "norm"), head()],
    }


def biased_head() -> Map:
    """A tied head with a bias, a scale and a softcap, behind layers with a parallel residual and no gate."""
    layer = [
        norm("x", "h", "norm", centred=True, bias="norm.bias"),
        *qkv("h"),
        *ropes(pairs="neighbours"),
        attention(k="k", v="v"),
        linear("a", "o", "attn.o", HIDDEN),
        linear("h", "u", "mlp.up", 20, bias=True),
        op("gate", "m", a="u", act="gelu_tanh"),
        linear("m", "d", "mlp.down", HIDDEN, bias=True),
        op("add", "o", a="o", b="d"),
        op("add", "x", a="x", b="o"),
    ]
    tied = {"weight": "embed.weight", "bias": "head.bias"}
    return {
        "stem": [embed()],
        "kinds": [layer],
        "order": [0, 0],
        "ropes": [ROPE],
        "top": [norm("x", "h", "norm", centred=True, bias="norm.bias"), head(scale=0.5, softcap=8.0) | tied],
    }


def chunks() -> Map:
    """Chunks, one of them shared, norms behind rope, a temperature with an offset, scaled inputs of experts."""
    stacks = {key: f"experts.{key}" for key in ("gate", "up", "down")}
    rest = [
        linear("a", "o", "attn.o", HIDDEN),
        op("add", "x", a="x", b="o"),
        norm("x", "h", "norm_2"),
        op("route", "r", src="h", weight="router.weight", experts=4, count=1, score="sigmoid"),
        op("experts", "m", src="h", route="r", **stacks, inner=10, rows=HIDDEN, act="silu", scale_input=True),
        op("add", "x", a="x", b="m"),
    ]
    chunked = [
        norm("x", "h", "norm_1"),
        *qkv("h"),
        *ropes(pairs="neighbours"),
        *(op("norm", part, src=part, epsilon=1e-5, group=6) for part in "qk"),
        attention(k="k", v="v", chunk=4),
        *rest,
    ]
    temperature = {"temperature_beta": 0.5, "temperature_length": 3, "temperature_offset": 1}
    full = [norm("x", "h", "norm_1"), *qkv("h"), attention(k="k", v="v", **temperature), *rest]
    sharing = [norm("x", "h", "norm_1"), linear("h", "q", "attn.q", 24), attention(window=3, shares=0), *rest]
    return {
        "stem": [embed()],
        "kinds": [chunked, full, sharing],
        "order": [0, 1, 0, 2],
        "ropes": [ROPE],
        "top": [norm("x", "h", "norm"), head()],
    }


def latent() -> Map:
    """Latent attention: a matrix for each head, heads joined from two values; a feed-forward part with xielu."""
    rows = {"queries": 4 * 5, "q": 4 * 4, "latent": 6, "k": 4}
    layer = [
        norm("x", "h", "norm_1"),
        *(linear("h", dst, f"attn.{dst}", count) for dst, count in rows.items()),
        norm("latent", "latent", "attn.latent_norm"),
        op("linear", "queries", src="queries", weight="attn.key_parts", bias="attn.key_bias", rows=4 * 6, parts=4),
        *(op("rope", part, src=part, table=0, head_dim=4, pairs="neighbours") for part in "qk"),
        op("concat", "q", a="queries", b="q", heads=4),
        op("concat", "k", a="latent", b="k", heads=1),
        attention(k="k", v="latent", kv_heads=1, head_dim=10, value_dim=6),
        op("linear", "a", src="a", weight="attn.value_parts", rows=4 * 3, parts=4),
        linear("a", "o", "attn.o", HIDDEN),
        op("add", "x", a="x", b="o"),
        norm("x", "h", "norm_2"),
        linear("h", "u", "mlp.up", 20),
        op("gate", "m", a="u", act="xielu", **{key: f"mlp.{key}" for key in ("alpha_p", "alpha_n", "beta", "eps")}),
        linear("m", "d", "mlp.down", HIDDEN),
        op("add", "x", a="x", b="d"),
    ]
    return {
        "stem": [embed()],
        "kinds": [layer],
        "order": [0, 0],
        "ropes": [{"frequencies": [1.0, 0.1]}],
        "top": [norm("x", "h", "norm"), head()],
    }


def rotated() -> Map:
    """Matrices behind Hadamard transforms of several blocks, in place and beside the plain value; a tied head."""

    def hadamard(src: str, block: int, dst: str | None = None) -> Map:
        return op("hadamard", dst or src, src=src, block=block)

    layer = [
        norm("x", "h", "norm_1"),
        hadamard("h", 4),
        *qkv("h"),
        *ropes(),
        attention(k="k", v="v"),
        hadamard("a", 8),
        linear("a", "o", "attn.o", HIDDEN),
        op("add", "x", a="x", b="o"),
        norm("x", "h", "norm_2"),
        hadamard("h", 2, "t"),
        linear("t", "g", "mlp.gate", 96),
        linear("h", "u", "mlp.up", 96),
        op("gate", "f", a="g", b="u", act="silu"),
        hadamard("f", 32),
        linear("f", "d", "mlp.down", HIDDEN),
        op("add", "x", a="x", b="d"),
    ]
    return {
        "stem": [embed(), hadamard("x", 4)],
        "kinds": [layer],
        "order": [0, 0],
        "ropes": [ROPE],
        "top": [norm("x", "h", "norm"), hadamard("h", 4), head() | {"weight": "embed.weight"}],
    }


PROGRAMS = {
    "program-biased-head.rkf": biased_head(),
    "program-chunks.rkf": chunks(),
    "program-experts.rkf": mixture(),
    "program-latent.rkf": latent(),
    "program-plain.rkf": plain(),
    "program-post-norms.rkf": post_norms(),
    "program-recurrent.rkf": recurrent(),
    "program-rotated.rkf": rotated(),
    "program-scan.rkf": scans(),
    "program-windows.rkf": windows(),
}
# Logits: file -> positions of the sequence. The second one of windows takes the long frequencies.
LOGITS = {
    **{name.replace(".rkf", ".logits.json"): (name, len(TOKENS)) for name in PROGRAMS},
    "program-windows.long.logits.json": ("program-windows.rkf", 64),
}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {f"t{n}": n for n in range(VOCABULARY)}, "unk_token": "t0"},
    "pre_tokenizer": {"type": "Whitespace"},
}
# config.json and its like travel as they came, and nothing is computed from them.
BLOBS = {
    "config.json": b'{"model_type": "golden"}\n',
    "generation_config.json": b"{}\n",
    "special_tokens_map.json": b'{"bos_token": "t1"}\n',
    "tokenizer.json": json.dumps(TOKENIZER).encode(),
    "tokenizer_config.json": b"{}\n",
}


def metadata(program: Map) -> Map:
    return {
        "add_bos": True,
        "bos_id": 1,
        "context_length": 64,
        "eos_ids": [2],
        "family": "golden",
        "generation": {"temperature": 0.5},
        "program": program,
        "special_tokens": {"bos_token": {"id": 1, "text": "t1"}, "mask_token": {"text": "<mask>"}},
    }


def tensors(file: str) -> dict[str, Golden]:
    """The tensors of a program, made from their names: matrices and stacks are clustered, a table an expert."""
    return {name: _tensor(f"{file} {name}", *rest) for name, *rest in Program.from_metadata(PROGRAMS[file]).weights()}


def _tensor(seed: str, shape: tuple[int, ...], role: str) -> Golden:
    if role in (EMBEDDING, MATRIX):
        return clustered(seed, shape, 32, affine=("row", None, "f32", None))
    if role == STACK:
        return clustered(seed, shape, 16, rows_per_table=shape[1], exceptions=(prod(shape) // 64, "bf16"))
    data = from_f32(uniform(seed, shape, 0.25, 1.25), "bf16")
    return Golden(DenseTensor("bf16", data), to_f32(data, "bf16"))


def logits(folder: Path, name: str) -> Map:
    """What stands in a file of logits."""
    file, positions = LOGITS[name]
    found = reference_program.run(folder / file, TOKENS, positions).round(12).tolist()
    return {"tokens": TOKENS, "positions": positions, "logits": found}
