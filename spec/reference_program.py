"""Runs the model of a file, from program.md alone: numpy, reference_reader.py beside it, and nothing of the project.

`run(path, tokens)` -> f64[tokens, vocabulary], the logits after each token. Plain and slow on purpose: a whole sequence
at once, in f64, one function an op. It checks nothing: what a reader has to refuse stands in program.md, section 10.

    python reference_program.py FILE TOKEN TOKEN …
"""

import math
import sys
from pathlib import Path

import numpy as np
import reference_reader

ERF = np.vectorize(math.erf, otypes=[float])
ACTIVATIONS = {
    "identity": lambda x: x,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + ERF(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


class Place:
    """Where an op runs: the values by name, the tensors, the number of its layer, and what is kept between layers."""

    def __init__(self, program, tensors, tokens, positions):
        self.program, self.tensors, self.tokens, self.positions = program, tensors, np.array(tokens), positions
        self.values, self.layer, self.prefix = {}, None, ""
        self.caches = {}  # layer -> keys, values: f64[tokens, kv_heads, dim]

    def tensor(self, name):
        return self.tensors[self.prefix + name].astype("f8")

    def bias(self, op, key="bias"):
        return self.tensor(op[key]) if key in op else 0.0


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def activate(op, x):
    return x * ACTIVATIONS["sigmoid"](op.get("alpha", 1.0) * x) if op["act"] == "silu" else ACTIVATIONS[op["act"]](x)


def gated(op, a, b):
    """act(a) * b, with the limit, alpha and shift of gate and experts; b may be None."""
    limit = op.get("limit", math.inf)
    a = activate(op, np.minimum(a, limit))
    return a if b is None else a * (np.clip(b, -limit, limit) + op.get("shift", 0.0))


# The ops: the map of one, the values that it reads by the names of its keys (f64[tokens, width]), and the place.
def embed(op, place):
    return op.get("scale", 1.0) * place.tensor(op["table"])[place.tokens]


def norm(op, place, src):
    x = src.reshape(len(src), -1, op.get("group", src.shape[1]))
    if op.get("centred"):
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + op["epsilon"])
    width = x.shape[2]  # of a group; with by_group, each has its own rows of weights and biases
    if "weight" in op:
        x = x * (place.tensor(op["weight"]) + op.get("offset", 0.0)).reshape(-1, width)
    return (x + place.bias(op).reshape(-1, width) if "bias" in op else x).reshape(src.shape)


def linear(op, place, src):
    if "parts" not in op:
        return src @ place.tensor(op["weight"]).T + place.bias(op)
    cut = np.split(src, op["parts"], axis=1)
    found = [part @ weight.T for part, weight in zip(cut, place.tensor(op["weight"]), strict=True)]
    return np.concatenate(found, axis=1) + place.bias(op)


def rope(op, place, src):
    table = place.program["ropes"][op["table"]]
    long = "long" in table and place.positions > table["original_context"]
    frequencies = np.array(table["long" if long else "frequencies"], "f8")
    angles = np.arange(len(src))[:, None, None] * frequencies
    cos, sin = (table.get("factor", 1.0) * wave for wave in (np.cos(angles), np.sin(angles)))
    heads, n = src.reshape(len(src), -1, op["head_dim"]).copy(), len(frequencies)
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if op.get("pairs") == "neighbours" else (
        slice(0, n), slice(n, 2 * n))  # fmt: skip
    a, b = heads[..., first].copy(), heads[..., second].copy()
    heads[..., first], heads[..., second] = a * cos - b * sin, b * cos + a * sin
    return heads.reshape(src.shape)


def attention(op, place, q, k=None, v=None):
    count, heads, kv_heads = len(q), op["heads"], op["kv_heads"]
    if k is not None:
        place.caches[place.layer] = k.reshape(count, kv_heads, -1), v.reshape(count, kv_heads, -1)
    keys, values = place.caches[op.get("shares", place.layer)]
    if "temperature_beta" in op:
        lengths = (np.arange(count) + op.get("temperature_offset", 0)) // op["temperature_length"]
        q = q * (1 + op["temperature_beta"] * np.log(1 + lengths))[:, None]
    q, out = q.reshape(count, heads, -1), np.empty((count, heads, op["value_dim"]))
    for position in range(count):
        first = position - position % op["chunk"] if "chunk" in op else position + 1 - op.get("window", count)
        seen = slice(max(0, first), position + 1)
        for head in range(heads):
            kv_head = head * kv_heads // heads
            scores = op["scale"] * (keys[seen, kv_head] @ q[position, head])
            if "softcap" in op:
                scores = op["softcap"] * np.tanh(scores / op["softcap"])
            if "sinks" in op:
                scores = np.append(scores, place.tensor(op["sinks"])[head])
            weights = softmax(scores)[: seen.stop - seen.start]
            out[position, head] = weights @ values[seen, kv_head]
    return out.reshape(count, -1)


def gate(op, place, a, b=None):
    if op.get("by_layer"):
        b = b[:, place.layer * a.shape[1] : (place.layer + 1) * a.shape[1]]
    if op["act"] != "xielu":
        return gated(op, a, b)
    x = np.minimum(a, op.get("limit", math.inf))
    alpha_p, alpha_n, beta, eps = (place.tensor(op[key]) for key in ("alpha_p", "alpha_n", "beta", "eps"))
    rise, fall = np.logaddexp(0, alpha_p), beta + np.logaddexp(0, alpha_n)
    return np.where(x > 0, rise * x**2, fall * (np.exp(np.minimum(x, eps)) - 1 - x)) + beta * x


def route(op, place, src):
    logits = src @ place.tensor(op["weight"]).T + place.bias(op)
    scores = {"softmax": softmax, "sigmoid": ACTIVATIONS["sigmoid"], "chosen": lambda x: x}[op["score"]](logits)
    ranked = scores + place.bias(op, "select")
    if "groups" in op:
        grouped = ranked.reshape(len(src), op["groups"], -1)
        best = np.sort(grouped, axis=-1)[..., -2:].sum(-1)
        left_out = np.argsort(-best, axis=-1, kind="stable")[:, op["top_groups"] :]
        np.put_along_axis(grouped, left_out[..., None], -np.inf, axis=1)
        ranked = grouped.reshape(ranked.shape)
    chosen = np.argsort(-ranked, axis=-1, kind="stable")[:, : op["count"]]
    weights = np.take_along_axis(scores, chosen, axis=-1)
    if op["score"] == "chosen":
        weights = softmax(weights)
    if op.get("normalise"):
        weights = weights / np.maximum(weights.sum(-1, keepdims=True) + op.get("add", 0.0), op.get("floor", 0.0))
    weights = weights * op.get("scale", 1.0)
    return chosen, weights * place.tensor(op["expert_scale"])[chosen] if "expert_scale" in op else weights


def experts(op, place, src, route):
    gates, ups, downs = (place.tensor(op[key]) for key in ("gate", "up", "down"))
    biases = [place.bias(op, f"{key}_bias") + np.zeros((len(gates), 1)) for key in ("gate", "up", "down")]
    out = np.zeros((len(src), op["rows"]))
    for token, (chosen, weights) in enumerate(zip(*route, strict=True)):
        for expert, weight in zip(chosen, weights, strict=True):
            x = src[token] * weight if op.get("scale_input") else src[token]
            gate_bias, up_bias, down_bias = (bias[expert] for bias in biases)
            inner = gated(op, gates[expert] @ x + gate_bias, ups[expert] @ x + up_bias)
            result = downs[expert] @ inner + down_bias
            out[token] += result if op.get("scale_input") else weight * result
    return out


def add(op, place, a, b):
    return a + op.get("scale", 1.0) * b


def concat(op, place, a, b):
    heads = [each.reshape(len(a), op["heads"], -1) for each in (a, b)]
    return np.concatenate(heads, axis=-1).reshape(len(a), -1)


def scale(op, place, src):
    return op.get("factor", 1.0) * src * (place.tensor(op["weight"]) if "weight" in op else 1.0)


def conv(op, place, src):
    taps, weight = op["taps"], place.tensor(op["weight"])
    padded = np.concatenate([np.zeros((taps - 1, src.shape[1])), src])
    total = sum(weight[:, tap] * padded[tap : tap + len(src)] for tap in range(taps))
    return activate({"act": op.get("act", "identity")}, total + place.bias(op))


def delta(op, place, src, a, b):
    key_heads, value_heads, key_dim = op["key_heads"], op["value_heads"], op["key_dim"]
    width = key_heads * key_dim
    q, k = (src[:, at : at + width].reshape(len(src), key_heads, key_dim) for at in (0, width))
    q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    v = src[:, 2 * width :].reshape(len(src), value_heads, op["value_dim"])
    decay = np.exp(-np.exp(place.tensor(op["a_log"])) * np.logaddexp(0, a + place.tensor(op["dt_bias"])))
    beta = ACTIVATIONS["sigmoid"](b)
    state, out = np.zeros((value_heads, key_dim, op["value_dim"])), np.empty_like(v)
    for position in range(len(src)):
        for head in range(value_heads):
            key = k[position, head * key_heads // value_heads]
            query = q[position, head * key_heads // value_heads] / math.sqrt(key_dim)
            held = decay[position, head] * state[head]
            state[head] = held + np.outer(key, beta[position, head] * (v[position, head] - held.T @ key))
            out[position, head] = state[head].T @ query
    return out.reshape(len(src), -1)


def scan(op, place, src, dt):
    heads, groups, state_dim = op["heads"], op["groups"], op["state_dim"]
    inner, shared = heads * op["head_dim"], groups * state_dim
    u = src[:, :inner].reshape(len(src), heads, -1)
    b, c = (src[:, at : at + shared].reshape(len(src), groups, state_dim) for at in (inner, inner + shared))
    steps = np.logaddexp(0, dt + place.tensor(op["dt_bias"])).clip(op.get("dt_min", 0.0), op.get("dt_max", math.inf))
    decay = np.exp(-np.exp(place.tensor(op["a_log"])) * steps)
    state, out = np.zeros((heads, state_dim, op["head_dim"])), u * place.tensor(op["d"])[:, None]
    for position in range(len(src)):
        for head in range(heads):
            group, entering = head * groups // heads, steps[position, head] * u[position, head]
            state[head] = decay[position, head] * state[head] + np.outer(b[position, group], entering)
            out[position, head] += state[head].T @ c[position, group]
    return out.reshape(len(src), -1)


def clip(op, place, src):
    return np.clip(src, -op["limit"], op["limit"])


def hadamard(op, place, src):
    numbers = np.arange(op["block"])
    signs = (-1.0) ** np.bitwise_count(numbers[:, None] & numbers)
    return (src.reshape(-1, op["block"]) @ signs / math.sqrt(op["block"])).reshape(src.shape)


def logits(op, place, src):
    found = op.get("scale", 1.0) * (src @ place.tensor(op["weight"]).T + place.bias(op))
    return op["softcap"] * np.tanh(found / op["softcap"]) if "softcap" in op else found


OPS = {function.__name__: function for function in (embed, norm, linear, rope, attention, gate, route, experts, add,
    concat, scale, conv, delta, scan, clip, hadamard, logits)}  # fmt: skip
READS = {"src", "q", "k", "v", "a", "b", "dt", "route"}  # the keys that name values


def run_ops(ops, place):
    for op in ops:
        read = {key: place.values[op[key]] for key in op.keys() & READS}
        place.values[op["dst"]] = OPS[op["op"]](op, place, **read)


def run_program(program, tensors, tokens, positions=None):
    """Section 4 of program.md. positions: the length of the sequence that they begin (only a rope with `long` asks)."""
    place = Place(program, tensors, tokens, len(tokens) if positions is None else positions)
    run_ops(program["stem"], place)
    lasting = set(place.values)
    for layer, kind in enumerate(program["order"]):
        place.layer, place.prefix = layer, f"model.layers.{layer}."
        run_ops(program["kinds"][kind], place)
        place.values = {name: place.values[name] for name in lasting}
    place.layer, place.prefix = None, ""
    run_ops(program["top"], place)
    return place.values[program["top"][-1]["dst"]]


def run(path, tokens, positions=None):
    """The logits after each token of a file that carries its program."""
    directory = reference_reader.open_directory(Path(path).read_bytes(), 1)
    return run_program(directory["metadata"]["model"]["program"], reference_reader.read(path), tokens, positions)


if __name__ == "__main__":
    print(*run(sys.argv[1], [int(token) for token in sys.argv[2:]]).argmax(-1))
