"""Roles and shared inputs of programs of several families, none of which the code knows."""

import rkf
from rkf.model.ops import Add, Attention, Conv, Delta, Embed, Experts, Gate, Linear, Logits, Norm, Rope, Route, Scan
from rkf.model.program import Program
from rkf.model.roles import KEPT_DENSE, ROLES, roles, shared_inputs
from tests.runtime import tiny
from tests.spec.document import VECTORS


def linear(src, dst, rows=8):
    return Linear(src=src, dst=dst, weight=f"{dst}.weight", rows=rows)


def attention(**changes):
    numbers = {"heads": 2, "kv_heads": 1, "head_dim": 4, "value_dim": 4, "scale": 0.5}
    return Attention(q="q", k="k", v="v", dst="mixed", **numbers, **changes)


def program(*layer):
    return Program(
        stem=(Embed(dst="x", table="table", rows=9, cols=8),),
        kinds=(layer,),
        order=(0, 0),
        top=(Logits(src="x", dst="logits", weight="head", rows=9),),
    )


def test_a_dense_decoder():
    found = roles(tiny.config().program(tiny.weights(tiny.config())))
    parts = {name.removesuffix(".weight").split(".")[-1]: role for name, role in found.items()}
    assert parts == {
        "embed_tokens": "embedding",
        "lm_head": "head",
        "q_proj": "query",
        "k_proj": "key",
        "v_proj": "value",
        "o_proj": "output",
        "gate_proj": "gate",
        "up_proj": "up",
        "down_proj": "down",
    }
    assert len(found) == 2 + 7 * tiny.config().layers


def test_values_are_followed_through_norms_ropes_gates_and_convolutions():
    layer = (
        linear("x", "q"),
        linear("x", "k", 4),
        linear("x", "v", 4),
        Norm(src="q", dst="q", epsilon=1e-6, group=4),
        Norm(src="v", dst="v", epsilon=1e-6),
        linear("x", "g"),
        attention(),
        Gate(a="g", b="mixed", dst="mixed", act="sigmoid"),
        Norm(src="mixed", dst="mixed", epsilon=1e-6),
        linear("mixed", "o"),
        Norm(src="o", dst="o", epsilon=1e-6),
        Add(a="x", b="o", dst="x"),
        linear("x", "c"),
        linear("x", "s"),
        Gate(a="c", b="s", dst="s", act="identity"),
        Conv(src="s", dst="s", weight="taps", taps=3),
        linear("s", "out"),
        linear("x", "alone"),
        Gate(a="alone", dst="alone", act="relu2"),
        linear("alone", "ungated_down"),
        Add(a="out", b="ungated_down", dst="out"),
        Add(a="x", b="out", dst="x"),
        linear("x", "low"),
        linear("low", "low_up"),
        Add(a="x", b="low_up", dst="x"),
    )
    found = {name.removeprefix("model.layers.1."): role for name, role in roles(program(*layer)).items()}
    assert found["taps"] == "kernel"
    of = {name.removesuffix(".weight"): role for name, role in found.items()}
    assert [of[name] for name in "qkvgo"] == ["query", "key", "value", "gate", "output"]
    assert [of[name] for name in ("c", "s", "out")] == ["gate", "up", "output"]
    assert [of[name] for name in ("alone", "ungated_down")] == ["up", "down"]
    assert [of[name] for name in ("low", "low_up")] == ["other", "other"]
    assert set(of.values()) <= set(ROLES)


def test_a_mixture_beside_a_shared_expert():
    layer = (
        Route(src="x", dst="r", weight="router", experts=4, count=2, score="softmax"),
        Experts(
            **{"src": "x", "route": "r", "dst": "m", "gate": "g", "up": "u", "down": "d", "act": "silu"},
            inner=6,
            rows=8,
        ),
        linear("x", "sg"),
        linear("x", "su"),
        Gate(a="sg", b="su", dst="s", act="silu"),
        linear("s", "s"),
        linear("x", "w", rows=1),
        Gate(a="w", b="s", dst="s", act="sigmoid"),
        Add(a="m", b="s", dst="m"),
        Add(a="x", b="m", dst="x"),
    )
    found = {name.removeprefix("model.layers.0."): role for name, role in roles(program(*layer)).items()}
    assert [found[name] for name in "gud"] == ["expert_gate", "expert_up", "expert_down"]
    assert found["router"] in KEPT_DENSE
    assert found["w.weight"] in KEPT_DENSE
    assert [found[f"{name}.weight"] for name in ("sg", "su", "s")] == ["gate", "up", "down"]
    assert shared_inputs(layer) == {
        "g": ("g", "u"),
        "d": ("d",),
        "sg.weight": ("sg.weight", "su.weight"),
        "s.weight": ("s.weight",),
    }


def test_the_matrix_of_the_delta_rule_is_as_precious_as_its_values():
    layer = (
        linear("x", "c", 16),
        linear("x", "a", 2),
        linear("x", "b", 2),
        Conv(src="c", dst="c", weight="taps", taps=4, act="silu"),
        Delta(
            **{"src": "c", "a": "a", "b": "b", "dst": "y", "a_log": "A", "dt_bias": "t"},
            **{"key_heads": 1, "value_heads": 2, "key_dim": 4, "value_dim": 4},
        ),
        linear("y", "o"),
        Add(a="x", b="o", dst="x"),
    )
    found = {name.removeprefix("model.layers.0."): role for name, role in roles(program(*layer)).items()}
    assert found["c.weight"] == "value"
    assert (found["a.weight"], found["b.weight"], found["o.weight"]) == ("other", "other", "output")


def test_the_parts_of_a_mamba_mixer():
    layer = (
        linear("x", "z"),
        linear("x", "c", 12),
        linear("x", "t", 2),
        Conv(src="c", dst="c", weight="taps", taps=4, act="silu"),
        Scan(
            **{"src": "c", "dt": "t", "dst": "y", "a_log": "A", "dt_bias": "b", "d": "D"},
            **{"heads": 2, "head_dim": 4, "groups": 1, "state_dim": 2},
        ),
        Gate(a="z", b="y", dst="y", act="silu"),
        Norm(src="y", dst="y", weight="norm", epsilon=1e-5, group=4, by_group=True),
        linear("y", "o"),
        Add(a="x", b="o", dst="x"),
    )
    found = {name.removeprefix("model.layers.0."): role for name, role in roles(program(*layer)).items()}
    assert [found[f"{name}.weight"] for name in "zcto"] == ["gate", "value", "other", "output"]
    assert found["taps"] in KEPT_DENSE


def test_an_input_ends_where_its_value_is_written_again():
    layer = (
        Norm(src="x", dst="h", epsilon=1e-6),
        linear("h", "q"),
        linear("h", "k", 4),
        linear("h", "v", 4),
        Rope(src="q", dst="q", table=0, head_dim=4),
        attention(),
        linear("mixed", "o"),
        Norm(src="o", dst="h", epsilon=1e-6),
        linear("h", "late"),
    )
    assert list(shared_inputs(layer).values()) == [
        ("q.weight", "k.weight", "v.weight"),
        ("o.weight",),
        ("late.weight",),
    ]


def test_a_table_that_is_also_the_head():
    tied = Program(
        stem=(Embed(dst="x", table="table", rows=9, cols=8),),
        kinds=((Add(a="x", b="x", dst="x"),),),
        order=(0,),
        top=(Logits(src="x", dst="logits", weight="table", rows=9),),
    )
    assert roles(tied) == {"table": "embedding"}


def test_latent_attention():
    with rkf.open(VECTORS / "program-latent.rkf") as file:
        found = roles(file.model.program)
    of = {name.split(".")[4]: role for name, role in found.items() if name.startswith("model.layers.1.attn.")}
    assert {name for name, role in of.items() if role == "query"} == {"queries", "key_parts", "q"}
    assert {name for name, role in of.items() if role == "key"} == {"latent", "k"}
    assert {name for name, role in of.items() if role == "output"} == {"value_parts", "o"}
