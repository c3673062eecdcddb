"""The rules of spec/program.md a second time and apart: keys from its tables, the rest by hand.

`check_model(directory)` is for files with the required bit 2. It shares no code with the project's reader.
"""

from dataclasses import MISSING

from tests.spec.document import code, op_keys, table
from tests.spec.reference import need

KEYS = op_keys()
WORDS = {code(row[0])[0]: code(row[1]) for row in table("program.md", "key", "one of")}
LIMITS = {row[0]: int(row[1]) for row in table("program.md", "limit", "value")}
MOST, LAYERS = LIMITS["greatest size and width"], LIMITS["layers"]
F32_MAX, NORMAL = 3.4028234663852886e38, 2.0**-126
BLOBS = ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json")
CHOSEN = "chosen"
KEEPERS = ("attention", "conv", "delta", "scan")


def keyed(value, required, optional, where):
    need(type(value) is dict and all(key in value for key in required), f"{where}: keys")
    need(all(key in (*required, *optional) or key.startswith("x-") for key in value), f"{where}: unknown key")
    return {key: value[key] for key in value if not key.startswith("x-")}


def listed(value, most, where):
    need(type(value) is list and len(value) <= most, f"{where}: not a list, or too long")
    return value


def is_number(value, positive=False):
    fits = type(value) in (int, float) and abs(value) <= F32_MAX
    return fits and (not positive or value >= NORMAL)


def is_integer(value, low, high):
    return type(value) is int and low <= value <= high


def is_name(value):
    control = type(value) is str and any(c < " " or "\x7f" <= c < "\xa0" for c in value)
    return type(value) is str and 1 <= len(value.encode()) <= 255 and not control


def check_words(program):
    """Section 10: what is only unknown is found before anything that is wrong."""
    program = program if type(program) is dict else {}
    kinds = program.get("kinds")
    lists = [program.get("stem"), program.get("top"), *(kinds if type(kinds) is list else [])]
    for op in [op for ops in lists if type(ops) is list for op in ops if type(op) is dict]:
        name = op.get("op")
        if type(name) is str:
            need(name in KEYS, f"op {name}", "unsupported")
            for key, rule in KEYS[name].items():
                word = op.get(key)
                if rule["kind"] == "choice" and type(word) is str:
                    need(word in WORDS[key], f"{name}: {key} {word}", "unsupported")


def read_op(op, ropes):
    """An op with its defaults filled in; None for what is absent."""
    need(type(op) is dict and type(op.get("op")) is str and op["op"] in KEYS, "no op")
    rules = KEYS[op["op"]]
    required = [key for key, rule in rules.items() if rule["default"] is MISSING]
    found = keyed(op, ["op", *required], rules, op["op"])
    for key, rule in rules.items():
        if key in found:
            kind, value = rule["kind"], found[key]
            fits = {
                "value": is_name(value),
                "tensor": is_name(value),
                "size": is_integer(value, 1, MOST),
                "number": is_number(value, rule["above"] is not None),
                "flag": type(value) is bool,
                "choice": type(value) is str,
                "rope": is_integer(value, 0, ropes - 1),
                "layer": is_integer(value, 0, LAYERS - 1),
            }[kind]
            need(fits, f"{op['op']}: {key} is {value!r}")
    return {key: rule["default"] for key, rule in rules.items()} | found


def read_program(value):
    program = keyed(value, ("kinds", "order", "ropes", "stem", "top"), (), "program")
    for rope in listed(program["ropes"], LIMITS["ropes"], "ropes"):
        rope = keyed(rope, ("frequencies",), ("factor", "long", "original_context"), "rope")
        for key in {"frequencies", "long"} & rope.keys():
            numbers = listed(rope[key], LIMITS["frequencies of a rope"], key)
            need(numbers and all(is_number(n) and n >= 0 for n in numbers), f"{key}: frequencies")
            need(len(numbers) == len(rope["frequencies"]), "long: length")
        need(is_number(rope.get("factor", 1.0), True), "factor")
        need(("long" in rope) == ("original_context" in rope), "long and original_context")
        need(is_integer(rope.get("original_context", 1), 1, MOST), "original_context")
    most, ropes = LIMITS["ops of `stem`, all `kinds` and `top` together"], len(program["ropes"])
    kinds = listed(program["kinds"], most, "kinds")
    lists = [listed(ops, most, "ops") for ops in (program["stem"], *kinds, program["top"])]
    need(all(lists) and sum(map(len, lists)) <= most, "ops: none or too many")
    stem, *kinds, top = [[read_op(op, ropes) for op in ops] for ops in lists]
    order = listed(program["order"], LAYERS, "order")
    need(order and all(is_integer(kind, 0, len(kinds) - 1) for kind in order), "order")
    need(set(order) == set(range(len(kinds))), "a kind without a layer")
    return stem, kinds, order, top, program["ropes"]


def reads(op):
    rules = KEYS[op["op"]]
    return [op[key] for key in rules if rules[key]["kind"] == "value" and key != "dst" and op[key] is not None]


def check_flow(stem, kinds, top):
    """Section 4: written before it is read, read before it is gone; section 5: ops where they may stand."""
    every = {value for ops in (stem, *kinds, top) for op in ops for value in reads(op)}
    lasting = {op["dst"] for op in stem}
    for ops in (stem, *kinds, top):
        written, unread = set() if ops is stem else set(lasting), set()
        for number, op in enumerate(ops):
            name, last = op["op"], ops is top and number == len(ops) - 1
            need(set(reads(op)) <= written, f"{name} reads what is not there")
            unread -= set(reads(op))
            need(op["dst"] not in unread, f"{op['dst']} is written twice")
            unread.add(op["dst"])
            written.add(op["dst"])
            need((name == "logits") == last, "logits are the end")
            need(name != "embed" or ops is stem, "embed is in the stem")
            in_layer = ops is not stem and ops is not top
            need(in_layer or not (name in KEEPERS or op.get("by_layer")), f"{name} in no layer")
        unread -= lasting & every
        need(unread <= ({top[-1]["dst"]} if ops is top else set()), f"unread: {unread}")


def shape_of(op, widths, layers):
    """Section 5: the type of what an op writes, and the shapes of its tensors by key."""
    w = {key: widths[op[key]] for key, rule in KEYS[op["op"]].items() if rule["kind"] == "value" and op[key] in widths}
    w.pop("dst", None)
    for key, width in w.items():
        need((type(width) is tuple) == (key == "route" and op["op"] == "experts"), f"{op['op']}: type of {key}")
    n, a, b = w.get("src"), w.get("a"), w.get("b")
    name, g = op["op"], op.get
    if name == "embed":
        return g("cols"), {"table": (g("rows"), g("cols"))}
    if name == "norm":
        group = g("group") or n
        need(n % group == 0 and (g("group") or not g("by_group")), "group")
        return n, dict.fromkeys(("weight", "bias"), (n if g("by_group") else group,))
    if name == "linear" and g("parts") is not None:
        parts = g("parts")
        need(n % parts == 0 and g("rows") % parts == 0, "parts")
        return g("rows"), {"weight": (parts, g("rows") // parts, n // parts), "bias": (g("rows"),)}
    if name in ("linear", "logits"):
        return g("rows"), {"weight": (g("rows"), n), "bias": (g("rows"),)}
    if name == "rope":
        need(n % g("head_dim") == 0, "head_dim")
        return n, {}
    if name == "attention":
        heads, kv_heads, head_dim, value_dim = (g(key) for key in ("heads", "kv_heads", "head_dim", "value_dim"))
        need(heads % kv_heads == 0, "kv_heads")
        need(("k" in w) == ("v" in w) == (g("shares") is None), "k, v, shares")
        need((g("temperature_beta") is None) == (g("temperature_length") is None), "temperature")
        need(g("temperature_offset") is None or g("temperature_length") is not None, "temperature")
        need(g("window") is None or g("chunk") is None, "window and chunk")
        due = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * value_dim}
        need(all(w[key] == due[key] for key in w), "widths of q, k, v")
        return heads * value_dim, {"sinks": (heads,)}
    if name == "gate":
        own = dict.fromkeys(("alpha_p", "alpha_n", "beta", "eps"), (1,))
        need(all((g(key) is not None) == (g("act") == "xielu") for key in own), "xielu")
        need(g("act") != "xielu" or b is None, "xielu")
        need(not g("by_layer") or b == layers * a, "by_layer")
        if g("by_layer") or b is None:
            return a, own
        need(a == b or 1 in (a, b), "gate")
        return max(a, b), {}
    if name == "route":
        experts, count, groups, top = (g(key) for key in ("experts", "count", "groups", "top_groups"))
        need(count <= experts and (groups is None) == (top is None), "count, groups")
        if groups is not None:
            size = experts // groups
            need(size * groups == experts and size >= 2 and top <= groups and count <= top * size, "groups")
        of_each = dict.fromkeys(("bias", "select", "expert_scale"), (experts,))
        return (experts, count), {"weight": (experts, n)} | of_each
    if name == "experts":
        experts, inner, rows = w["route"][0], g("inner"), g("rows")
        stacks = {"gate": (experts, inner, n), "up": (experts, inner, n), "down": (experts, rows, inner)}
        need(g("act") != "xielu", "xielu")
        return rows, stacks | {f"{key}_bias": shape[:2] for key, shape in stacks.items()}
    if name == "add":
        need(a == b, "add")
        return a, {}
    if name == "concat":
        need(a % g("heads") == 0 and b % g("heads") == 0, "heads of concat")
        return a + b, {}
    if name == "delta":
        key_heads, value_heads = g("key_heads"), g("value_heads")
        need(value_heads % key_heads == 0 and a == b == value_heads, "value_heads")
        need(n == 2 * key_heads * g("key_dim") + value_heads * g("value_dim"), "src of delta")
        return value_heads * g("value_dim"), dict.fromkeys(("a_log", "dt_bias"), (value_heads,))
    if name == "scan":
        heads, groups, least, most = g("heads"), g("groups"), g("dt_min"), g("dt_max")
        need(heads % groups == 0 and w["dt"] == heads, "heads of scan")
        need(n == heads * g("head_dim") + 2 * groups * g("state_dim"), "src of scan")
        need(least >= 0 and (most is None or least <= most), "limits of scan")
        return heads * g("head_dim"), dict.fromkeys(("a_log", "dt_bias", "d"), (heads,))
    need(g("act") != "xielu", "xielu")
    if name == "hadamard":
        block = g("block")
        need(n % block == 0 and block & (block - 1) == 0, "block")
        return n, {}
    return n, {"scale": {"weight": (1,)}, "conv": {"weight": (n, g("taps")), "bias": (n,)}, "clip": {}}[name]


def tensors_of(stem, kinds, order, top, ropes):
    """Widths of every list, and the tensors of the whole: {full name: shape}."""
    shapes, lasting = {}, {}
    for where, ops in (("stem", stem), *enumerate(kinds), ("top", top)):
        widths, own = dict(lasting), shapes.setdefault(where, {})
        for op in ops:
            width, tensors = shape_of(op, widths, len(order))
            need(type(width) is tuple or width <= MOST, "a width that is too great")
            need((lasting if where != "stem" else widths).get(op["dst"], width) == width, "two types")
            widths[op["dst"]] = width
            if op["op"] == "rope":
                need(2 * len(ropes[op["table"]]["frequencies"]) <= op["head_dim"], "frequencies")
            if op["op"] == "embed":
                need(op["rows"] >= top[-1]["rows"], "rows of embed")
            for key, shape in tensors.items():
                if op.get(key) is not None:
                    need(own.setdefault(op[key], shape) == shape, f"{op[key]}: two shapes")
        lasting = widths if where == "stem" else lasting
    found = dict(shapes["stem"])
    for prefix, where in [*((f"model.layers.{n}.", kind) for n, kind in enumerate(order)), ("", "top")]:
        for name, shape in shapes[where].items():
            need(found.setdefault(prefix + name, shape) == shape, f"{name}: two shapes")
    return found


def check_caches(kinds, order):
    """Section 8."""
    own = []
    for kind in kinds:
        keeps = [op for op in kind if op["op"] == "attention" and op["shares"] is None]
        need(len(keeps) <= 1, "two caches")
        need(all(sum(op["op"] == name for op in kind) <= 1 for name in KEEPERS[1:]), "two states")
        own.append(keeps[0] if keeps else None)
    for layer, kind in enumerate(order):
        for op in kinds[kind]:
            if op["op"] == "attention" and op["shares"] is not None:
                need(op["shares"] < layer, "a later layer")
                cache = own[order[op["shares"]]]
                need(cache is not None, "no cache")
                need(all(cache[key] == op[key] for key in ("kv_heads", "head_dim", "value_dim")), "another shape")
                reach, held = (each["window"] or each["chunk"] for each in (op, cache))
                need(held is None or (reach or MOST) <= held, "a wider window")


def check_model(directory):
    """Sections 3 to 10, for the directory of a file with bit 2."""
    need(type(directory["metadata"].get("model")) is dict, "no model")
    model = directory["metadata"]["model"]
    check_words(model.get("program"))
    required = ("add_bos", "context_length", "eos_ids", "generation", "program", "special_tokens")
    model = keyed(model, required, ("bos_id", "family"), "model")
    stem, kinds, order, top, ropes = read_program(model["program"])
    check_flow(stem, kinds, top)
    due = tensors_of(stem, kinds, order, top, ropes)
    check_caches(kinds, order)
    below = top[-1]["rows"] - 1
    need(type(model["add_bos"]) is bool and (not model["add_bos"] or "bos_id" in model), "add_bos")
    need(is_integer(model["context_length"], 1, MOST) and is_name(model.get("family", "f")), "context_length, family")
    ids = [*listed(model["eos_ids"], LIMITS["end tokens"], "eos_ids"), model.get("bos_id", 0)]
    need(type(model["generation"]) is dict and type(model["special_tokens"]) is dict, "maps")
    numbers = [value for key, value in model["generation"].items() if not key.startswith("x-")]
    need(all(type(value) in (int, float) for value in numbers), "generation")
    need(len(model["special_tokens"]) <= LIMITS["special tokens"], "special_tokens")
    for name, token in model["special_tokens"].items():
        if not name.startswith("x-"):
            token = keyed(token, ("text",), ("id",), name)
            need(type(token["text"]) is str, name)
            ids.append(token.get("id", 0))
    need(all(is_integer(token, 0, below) for token in ids), "token ids")
    tensors = {tensor["name"]: tensor for tensor in directory["tensors"]}
    shapes = {name: tensors[tensor.get("target", name)]["shape"] for name, tensor in tensors.items()}
    need({name: tuple(shape) for name, shape in shapes.items()} == due, "tensors")
    need("tokenizer.json" in [section.get("name") for section in directory["sections"]], "tokenizer.json")
