"""Every kernel by name and CPU level: the one place that lists specialisations.

step                        a forward pass: the phases of a plan
serve, publish              a worker thread's loop, and the start of a call (threads.py)
row:f32|bf16|f16|clustered  one row of a matrix as f32
f32                         product in f32, any number of tokens
one:W, many:W               fast products of one token and of many; W: index width, or 7i, 8i where ranks are the
                            values, 6g where 64 values lie in groups (AVX2)
far:W                       one:W with prefetches into the second-level cache (AVX-512)

Work of phases, and micro-ops (kernels/linear.py, mixing.py, token_ops.py, norms.py, rope.py, hadamard.py, packing.py);
C: a format of the cache, "capped" with a softcap:
linear, linear:added, linear:gated:ACT, logits
attend:one:C[:capped], attend:many:C[:capped], remember:C, join
route:SCORE, sort, gather, experts:one:gate:ACT, experts:many:gate:ACT, experts:one:down, experts:many:down, mix
conv:ACT, delta, scan
tokens, embed, take, add, concat, scale, clip, hadamard, xielu, gated:ACT, activated:ACT, norm:KIND, rope:PAIRS, pack,
pack:rounded
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from rkf.runtime.kernels import (
    experts,
    f32,
    hadamard,
    half,
    int8_avx2,
    int8_avx512,
    int8_avxvnni,
    int8_neon,
    int8_portable,
    linear,
    many_avx2,
    many_avx512,
    many_avxvnni,
    mixing,
    norms,
    packing,
    products,
    recurrent,
    rope,
    serve,
    token_ops,
)
from rkf.runtime.kernels.activations import ACTIVATIONS
from rkf.runtime.kernels.inline import inline
from rkf.runtime.kernels.step import step
from rkf.runtime.kv_cache import FORMATS

_PRODUCT = (types.int64,) * 8  # matrix, activation, tokens, y, y_stride, low, high, scratch
_ROW = (types.int64,) * 3  # matrix, row, out
_STEP = (types.int64,) * 4  # plan, batch, thread, tag
_WORK = (types.int64,) * 4  # item or token, arguments, batch, thread

_LEVELS: dict[str, Any] = {
    "avx512": int8_avx512,
    "avxvnni": int8_avxvnni,
    "avx2": int8_avx2,
    "neon": int8_neon,
    "portable": int8_portable,
}

Kernel = tuple[Callable[..., Any], tuple[Any, ...]]


def _row(name: str, level: str) -> Callable[..., Any]:
    if name == "clustered":
        return f32.clustered_row
    if name == "f32":
        return f32.dense_row(f32.f32_wide, f32.f32_single, 4)
    widen = half.bf16_widen if name == "bf16" else half.widening(level)
    return f32.dense_row(half.wide(widen), half.single(widen), 2)


_PLAIN: dict[str, Callable[..., Any]] = {
    "linear": linear.linear,
    "linear:added": linear.linear_added,
    "logits": linear.logits,
    "join": mixing.join,
    "sort": experts.sort,
    "gather": experts.gather,
    "experts:one:down": experts.experts_down("one"),
    "experts:many:down": experts.experts_down("many"),
    "mix": experts.mix,
    "delta": recurrent.delta,
    "scan": recurrent.scan,
    "tokens": token_ops.tokens,
    "embed": token_ops.embed,
    "take": token_ops.take,
    "add": token_ops.add,
    "concat": token_ops.concat,
    "xielu": token_ops.xielu,
    "scale": token_ops.scale,
    "clip": token_ops.clip,
    "hadamard": hadamard.hadamard,
}


def _attend(variant: str, level: str) -> Callable[..., Any]:
    tokens, cache, *capped = variant.split(":")
    build = mixing.attend_one if tokens == "one" else mixing.attend_many
    return build(cache, level, bool(capped))


_FAMILIES: dict[str, tuple[Callable[[str, str], Callable[..., Any]], list[str]]] = {
    "linear:gated": (lambda act, level: linear.linear_gated(act), list(ACTIVATIONS)),
    "gated": (lambda act, level: token_ops.gated(act), list(ACTIVATIONS)),
    "activated": (lambda act, level: token_ops.activated(act), list(ACTIVATIONS)),
    "experts:one:gate": (lambda act, level: experts.experts_gate("one", act), list(ACTIVATIONS)),
    "experts:many:gate": (lambda act, level: experts.experts_gate("many", act), list(ACTIVATIONS)),
    "route": (lambda score, level: experts.route(score), list(experts.SCORES)),
    "conv": (lambda act, level: recurrent.conv(act), list(ACTIVATIONS)),
    "norm": (lambda kind, level: norms.norm(kind), list(norms.NORMS)),
    "rope": (lambda pairs, level: rope.rope(pairs), list(rope.PAIRS)),
    "remember": (mixing.remember, list(FORMATS)),
    "attend": (
        _attend,
        [f"{tokens}:{cache}{cap}" for tokens in ("one", "many") for cache in FORMATS for cap in ("", ":capped")],
    ),
    "pack": (lambda variant, level: packing.pack(level, variant == "rounded"), ["", "rounded"]),
}


def _work(name: str, level: str) -> Callable[..., Any] | None:
    """The work of a phase or a micro-op of this name, or None."""
    if name in _PLAIN:
        return _PLAIN[name]
    for family, (build, variants) in _FAMILIES.items():
        for variant in variants:
            if name == _joined(family, variant):
                return build(variant, level)
    return None


def _joined(family: str, variant: str) -> str:
    return f"{family}:{variant}" if variant else family


def kernel(name: str, level: str) -> Kernel:
    """A kernel's function and its argument types."""
    work = _work(name, level)
    if work is not None:
        return work, _WORK
    family, _, variant = name.partition(":")
    if family == "step":
        return step, _STEP
    if family in ("serve", "publish"):
        return getattr(serve, family), _STEP
    if family == "row":
        return _row(variant, level), _ROW
    if family == "f32":
        return f32.multiply, _PRODUCT
    level_kernels = _LEVELS[level]
    if family == "one" and level in ("avx2", "avx512"):
        return level_kernels.multiply_one(variant), _PRODUCT
    if family == "far":
        return int8_avx512.multiply_one(variant, far=True), _PRODUCT
    if level == "avx512":
        return many_avx512.multiply_many(variant), _PRODUCT
    weights = level_kernels.WEIGHTS[variant]
    if family == "one":
        return products.multiply_one(weights, level_kernels.SUMS), _PRODUCT
    few = products.multiply_many(weights, level_kernels.SUMS)
    panels = {"avx2": many_avx2, "avxvnni": many_avxvnni}.get(level)
    return panels.multiply_many(weights, inline(few)) if panels else few, _PRODUCT


def names(level: str) -> list[str]:
    """Every kernel of a CPU level."""
    fixed = ["step", "serve", "publish", "f32", *(f"row:{kind}" for kind in ("f32", "bf16", "f16", "clustered"))]
    work = [_joined(family, variant) for family, (_, variants) in _FAMILIES.items() for variant in variants]
    families = ["one", "far", "many"] if level == "avx512" else ["one", "many"]
    return fixed + [*_PLAIN] + work + [f"{name}:{width}" for name in families for width in _LEVELS[level].WEIGHTS]
