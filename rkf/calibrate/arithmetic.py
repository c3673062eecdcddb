"""The arithmetic of ops on batches of tokens, in numpy f32 (spec/program.md, section 4). Knows no names of values.

Values are f32[batch, tokens, width]. Calibrated files must not change, so the order of operations here is fixed.
"""

from __future__ import annotations

from math import erf
from typing import Any, NamedTuple, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rkf.model.ops import Attention, Delta, Experts, Gate, Norm, Rope, Route, Scan

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

_SCORES = 1 << 21  # attention scores held at once, unless one sequence has more (they grow with its tokens squared)
_CHUNK = 64  # tokens that Scan takes together
_GELU_TANH = np.float32(np.sqrt(2 / np.pi))


class Routed(NamedTuple):
    """The output of Route. experts: i64[batch, tokens, count], best first; weights: f32[batch, tokens, count]."""

    experts: I64
    weights: F32


def normed(op: Norm, x: F32, weight: F32 | None, bias: F32 | None) -> F32:
    """weight, bias: f32[group], or f32[width] if each group has its own."""
    groups = x.reshape(*x.shape[:-1], -1, op.group) if op.group else x
    if op.centred:
        groups = groups - groups.mean(axis=-1, keepdims=True)
    out = groups / np.sqrt(np.mean(groups * groups, axis=-1, keepdims=True) + np.float32(op.epsilon))
    size = groups.shape[-1]
    if weight is not None:
        out = out * (weight + np.float32(op.offset) if op.offset else weight).reshape(-1, size)
    if bias is not None:
        out = out + bias.reshape(-1, size)
    flat: F32 = out.reshape(x.shape)
    return flat


def rotation(frequencies: F32, factor: float, positions: I64) -> tuple[F32, F32]:
    """Cosines and sines times factor, f32[tokens, frequencies] each."""
    angles = positions[:, None].astype(np.float32) * frequencies
    cos, sin = np.cos(angles), np.sin(angles)
    return (cos, sin) if factor == 1 else (cos * np.float32(factor), sin * np.float32(factor))


def turned(op: Rope, x: F32, turn: tuple[F32, F32]) -> F32:
    """x with the first numbers of each head rotated. turn: cosines and sines of the tokens."""
    cos, sin = (part[:, None] for part in turn)
    heads = x.reshape(*x.shape[:2], -1, op.head_dim)
    width = 2 * cos.shape[-1]
    if op.pairs == "halves":
        a, b = np.split(heads[..., :width], 2, axis=-1)
        parts = [a * cos - b * sin, b * cos + a * sin]
    else:
        a, b = heads[..., :width:2], heads[..., 1:width:2]
        pairs = np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
        parts = [pairs.reshape(*pairs.shape[:-2], width)]
    return np.concatenate([*parts, heads[..., width:]], axis=-1).reshape(x.shape)


def by_head(x: F32, heads: int) -> F32:
    """f32[batch, tokens, heads * dim] as f32[batch, heads, tokens, dim]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def attended(op: Attention, q: F32, keys: F32, values: F32, sinks: F32 | None, positions: I64) -> F32:
    """q: f32[batch, tokens, heads * head_dim], at `positions`; keys, values: f32[batch, kv_heads, keys, dim], from
    position 0 on. Returns f32[batch, tokens, heads * value_dim].
    """
    queries = by_head(q, op.heads)
    if op.temperature_beta is not None and op.temperature_length is not None:
        grown = np.log1p((positions + (op.temperature_offset or 0)) // op.temperature_length)
        queries = queries * (1 + op.temperature_beta * grown).astype(np.float32)[:, None]
    hidden = _hidden(op, positions, keys.shape[2])
    bias = np.where(hidden, np.float32(-np.inf), np.float32(0))
    mixed = np.empty((len(q), op.heads, q.shape[1], op.value_dim), np.float32)
    together = max(1, _SCORES // (op.heads * bias.size))
    for start in range(0, len(q), together):
        part = slice(start, start + together)
        mixed[part] = _mixed(queries[part] * np.float32(op.scale), keys[part], values[part], bias, op.softcap, sinks)
    return mixed.transpose(0, 2, 1, 3).reshape(*q.shape[:2], -1)


def _mixed(queries: F32, keys: F32, values: F32, bias: F32, softcap: float | None, sinks: F32 | None) -> F32:
    """Values mixed by softmax(queries keys^T + bias), f32[batch, heads, tokens, value_dim].

    queries: f32[batch, heads, tokens, head_dim]; bias: f32[tokens, keys]; sinks: f32[heads].
    """
    grouped = queries.reshape(*keys.shape[:2], -1, keys.shape[3])  # heads that share keys are adjacent
    scores: F32 = grouped @ keys.swapaxes(2, 3)
    by_query = scores.reshape(*queries.shape[:3], -1)  # a view
    if softcap is not None:
        np.tanh(scores / np.float32(softcap), out=scores)
        scores *= np.float32(softcap)
    by_query += bias
    most = by_query.max(axis=-1, keepdims=True)
    if sinks is not None:
        most = np.maximum(most, sinks[:, None, None])
    by_query -= most
    np.exp(scores, out=scores)
    total = by_query.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None, None] - most)
    by_query /= total
    mixed: F32 = (scores @ values).reshape(*queries.shape[:3], -1)
    return mixed


def _hidden(op: Attention, positions: I64, keys: int) -> NDArray[np.bool_]:
    """bool[tokens, keys]: the keys that each token may not see: later ones, and those before its window or chunk."""
    first = np.zeros_like(positions)
    if op.window is not None:
        first = positions - op.window + 1
    elif op.chunk is not None:
        first = positions - positions % op.chunk
    return (np.arange(keys) > positions[:, None]) | (np.arange(keys) < first[:, None])


def activated(name: str, x: F32, alpha: float = 1.0) -> F32:
    """One of op.ACTIVATIONS; alpha belongs to silu."""
    out: Any
    if name == "silu":
        out = _silu(x, alpha)
    elif name == "sigmoid":
        out = 1 / (1 + np.exp(np.minimum(-x, 80)))
    elif name == "gelu_tanh":
        out = 0.5 * x * (1 + np.tanh(_GELU_TANH * (x + np.float32(0.044715) * x * x * x)))
    elif name == "gelu":
        out = 0.5 * x * (1 + _erf(x * np.float32(0.5**0.5)))
    elif name in ("relu", "relu2"):
        out = np.maximum(x, 0)
        out = out * out if name == "relu2" else out
    else:
        out = x
    return cast(F32, out)


def _silu(x: F32, alpha: float) -> F32:
    """In place: temporaries of a layer's inner width take twice the time."""
    out: F32 = np.multiply(x, np.float32(-alpha))
    np.minimum(out, 80, out=out)
    np.exp(out, out=out)
    out += 1
    np.divide(x, out, out=out)
    return out


@njit(cache=True, nogil=True)
def _erf(x):
    """The error function, which numpy lacks."""
    out = np.empty_like(x)
    for i in range(x.size):
        out.flat[i] = erf(x.flat[i])
    return out


def xielu(x: F32, alpha_p: F32, alpha_n: F32, beta: F32, eps: F32) -> F32:
    """The activation of this name; its numbers are f32[1] each."""
    p, n = np.logaddexp(np.float32(0), alpha_p), beta + np.logaddexp(np.float32(0), alpha_n)
    out: F32 = np.where(x > 0, p * x * x, n * (np.expm1(np.minimum(x, eps)) - x)) + beta * x
    return out


def gated(op: Gate | Experts, a: F32, b: F32 | None) -> F32:
    """act(a) * b, with the clamps and the shift of the op."""
    if op.limit is not None:
        a = np.minimum(a, np.float32(op.limit))
        b = None if b is None else np.clip(b, np.float32(-op.limit), np.float32(op.limit))
    a = activated(op.act, a, op.alpha)
    if b is None:
        return a
    out: F32 = a * (b + np.float32(op.shift) if op.shift else b)
    return out


def routed(op: Route, logits: F32, select: F32 | None, expert_scale: F32 | None) -> Routed:
    """The experts of each token. logits: f32[batch, tokens, experts], with the bias; others: f32[experts]."""
    scores = logits
    if op.score == "softmax":
        scores = _softmax(logits)
    elif op.score == "sigmoid":
        scores = activated("sigmoid", logits)
    ranked = scores if select is None else scores + select
    if op.groups is not None and op.top_groups is not None:
        ranked = _in_best_groups(ranked, op.groups, op.top_groups)
    experts = np.argsort(-ranked, axis=-1, kind="stable")[..., : op.count]
    weights = np.take_along_axis(scores, experts, axis=-1)
    if op.score == "chosen":
        weights = _softmax(weights)
    if op.normalise:
        total = weights.sum(axis=-1, keepdims=True) + np.float32(op.add)
        weights = weights / np.maximum(total, np.float32(op.floor))
    if op.scale != 1:
        weights = weights * np.float32(op.scale)
    return Routed(experts, weights if expert_scale is None else weights * expert_scale[experts])


def _in_best_groups(ranked: F32, groups: int, best: int) -> F32:
    """-inf for the experts outside the groups with the highest sum of their two best."""
    by_group = ranked.reshape(*ranked.shape[:-1], groups, -1)
    sums = np.sort(by_group, axis=-1)[..., -2:].sum(axis=-1)
    chosen = np.argsort(-sums, axis=-1, kind="stable")[..., :best]
    kept = np.zeros(sums.shape, np.bool_)
    np.put_along_axis(kept, chosen, True, axis=-1)
    return np.where(kept[..., None], by_group, np.float32(-np.inf)).reshape(ranked.shape)


def _softmax(x: F32) -> F32:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    out: F32 = powers / powers.sum(axis=-1, keepdims=True)
    return out


def convolved(x: F32, before: F32, weight: F32, bias: F32 | None, act: str) -> tuple[F32, F32]:
    """(The output of Conv, the inputs that the next chunk needs).

    x: f32[batch, tokens, width]; before: f32[batch, taps - 1, width]; weight: f32[width, taps].
    """
    taps = weight.shape[1]
    padded = np.concatenate([before, x], axis=1)
    out = np.zeros_like(x)
    for tap in range(taps):
        out += padded[:, tap : tap + x.shape[1]] * weight[:, tap]
    if bias is not None:
        out += bias
    return activated(act, out), padded[:, padded.shape[1] - (taps - 1) :]


def delta_rule(op: Delta, x: F32, a: F32, b: F32, a_log: F32, dt_bias: F32, state: F32) -> tuple[F32, F32]:
    """(The output of Delta, the state after it). x, a, b: the op's src, a and b; state: f32[batch, value_heads,
    key_dim, value_dim].
    """
    keys = op.key_heads * op.key_dim
    copies = op.value_heads // op.key_heads
    q, k = (
        np.repeat(_unit(part.reshape(*x.shape[:2], op.key_heads, op.key_dim)), copies, axis=2)
        for part in (x[..., :keys], x[..., keys : 2 * keys])
    )
    q = q * np.float32(op.key_dim**-0.5)
    v = x[..., 2 * keys :].reshape(*x.shape[:2], op.value_heads, op.value_dim)
    decay = np.exp(-np.exp(a_log) * np.logaddexp(np.float32(0), a + dt_bias))
    beta = activated("sigmoid", b)
    out = np.empty(v.shape, np.float32)
    for token in range(x.shape[1]):
        state = state * decay[:, token, :, None, None]
        key = k[:, token, :, :, None]
        missing = v[:, token] - (state * key).sum(axis=2)
        state = state + key * (beta[:, token, :, None] * missing)[:, :, None]
        out[:, token] = (state * q[:, token, :, :, None]).sum(axis=2)
    return out.reshape(*x.shape[:2], -1), state


def scanned(op: Scan, x: F32, dt: F32, a_log: F32, dt_bias: F32, d: F32, state: F32) -> tuple[F32, F32]:
    """(The output of Scan, the state after it). x, dt: the op's src and dt; state: f32[batch, heads, state_dim,
    head_dim]. Within a chunk it is attention whose weights decay (Dao and Gu, arXiv 2405.21060).
    """
    inner, shared = op.heads * op.head_dim, op.groups * op.state_dim
    values = by_head(x[..., :inner], op.heads)
    b, c = (
        np.repeat(by_head(part, op.groups), op.heads // op.groups, axis=1)
        for part in (x[..., inner : inner + shared], x[..., inner + shared :])
    )
    steps = np.logaddexp(np.float32(0), dt + dt_bias).clip(np.float32(op.dt_min), np.float32(op.dt_max or np.inf))
    steps = steps.swapaxes(1, 2)
    log_decay, entering = -np.exp(a_log)[:, None] * steps, steps[..., None] * values
    out = d[:, None, None] * values
    for start in range(0, x.shape[1], _CHUNK):
        some = slice(start, start + _CHUNK)
        mixed, state = _scanned_chunk(c[:, :, some], b[:, :, some], entering[:, :, some], log_decay[:, :, some], state)
        out[:, :, some] += mixed
    return out.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1), state


def _scanned_chunk(c: F32, b: F32, entering: F32, log_decay: F32, state: F32) -> tuple[F32, F32]:
    """Some tokens after a state. c, b: f32[batch, heads, tokens, state_dim]; entering: f32[…, head_dim]; log_decay:
    f32[batch, heads, tokens]. Sums of decays are f64: they may reach 1000 where two tokens differ by 0.01.
    """
    total = log_decay.cumsum(axis=-1, dtype=np.float64)
    since, left = (np.exp(part)[..., None].astype(np.float32) for part in (total, total[..., -1:] - total))
    between = np.tril(np.exp(np.minimum(total[..., :, None] - total[..., None, :], 0))).astype(np.float32)
    mixed = since * (c @ state) + (c @ b.swapaxes(2, 3) * between) @ entering
    return mixed, since[..., -1:, :] * state + (left * b).swapaxes(2, 3) @ entering


def _unit(x: F32) -> F32:
    """x / sqrt(sum of squares + 1e-6) over the last axis."""
    out: F32 = x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + np.float32(1e-6))
    return out
