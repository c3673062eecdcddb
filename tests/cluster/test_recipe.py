"""Recipes as data: the effect of each pattern and option, and the refusals."""

import pytest

from rkf.cluster import Recipe, Rule
from rkf.cluster.recipe import DENSE, shipped_names
from rkf.errors import UsageError
from rkf.model.ops import Add, Conv, Embed, Experts, Logits, Route
from rkf.model.program import Program
from tests.runtime import tiny

EMBEDDING, QUERY, NORM = "model.embed_tokens.weight", "model.layers.3.self_attn.q_proj.weight", "model.norm.weight"
DOWN, UP = "model.layers.3.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"
PROGRAM = tiny.config(layers=12).program(tiny.weights(tiny.config(layers=12)))


def parse(text, k=None):
    return Recipe.parse(text, "test", PROGRAM, k)


def test_first_match_decides_and_the_rest_is_dense():
    recipe = parse(
        'k = 8\n[[rule]]\ntensors = ["*.q_proj.*", "x"]\nk = 32\n[[rule]]\ntensors = ["*proj*"]\nk_factor = 4'
    )
    assert recipe.rule(QUERY, (4, 4)) == Rule(k=32)
    assert recipe.rule(UP, (4, 4)) == Rule(k=32)
    assert recipe.rule(EMBEDDING, (4, 4)) == DENSE


def test_one_dimension_is_always_dense():
    assert parse('k = 16\n[[rule]]\ntensors = ["*"]').rule(NORM, (64,)) == DENSE


@pytest.mark.parametrize(("base", "expected"), [(2, 32), (16, 64), (24, 96), (64, 128), (200, 200), (256, 255)])
def test_a_factor_raises_k_up_to_128_and_the_grid_holds_255(base, expected):
    rule = '[[rule]]\ntensors = ["*"]\nk_factor = 4\nk_min = 32\ngrid = true\naffine = "row"'
    assert parse(f"k = 16\n{rule}", k=base).rule(EMBEDDING, (4, 4)).k == expected


def test_a_rule_overrides_the_defaults():
    text = 'k = 8\n[defaults]\nexceptions = 0.01\naffine = "row"\n[[rule]]\nroles = ["query"]\naffine = "none"\n'
    recipe = parse(text + '[[rule]]\nroles = ["down"]\n[[rule]]\nroles = ["embedding"]\ndense = true')
    assert recipe.rule(QUERY, (4, 4)) == Rule(k=8, exceptions=0.01)
    assert recipe.rule(DOWN, (4, 4)) == Rule(k=8, exceptions=0.01, affine="row")
    assert recipe.rule(EMBEDDING, (4, 4)) == DENSE


def test_last_is_the_last_layer():
    recipe = parse('[[rule]]\ntensors = ["model.layers.{last}.*"]\nk = 64')
    assert recipe.rule("model.layers.11.mlp.up_proj.weight", (4, 4)) == Rule(k=64)
    assert recipe.rule("model.layers.1.mlp.up_proj.weight", (4, 4)) == DENSE


@pytest.mark.parametrize(("layers", "expected"), [("first", [0]), ("last", [11]), ("ends", [0, 11])])
def test_all_that_a_rule_says_must_fit(layers, expected):
    recipe = parse(f'[[rule]]\nlayers = "{layers}"\nroles = ["up", "down"]\ntensors = ["*up*"]\nk = 64')
    names = [f"model.layers.{n}.{kind}.weight" for n in range(12) for kind in ("mlp.up_proj", "mlp.down_proj")]
    found = [name for name in [*names, QUERY, EMBEDDING] if recipe.rule(name, (4, 4)) != DENSE]
    assert found == [f"model.layers.{n}.mlp.up_proj.weight" for n in expected]


def test_routers_and_kernels_stay_dense_and_experts_have_a_table_each():
    layer = (
        Route(src="x", dst="r", weight="router", experts=4, count=2, score="softmax"),
        Experts(
            **{"src": "x", "route": "r", "dst": "m", "gate": "g", "up": "u", "down": "d", "act": "silu"},
            **{"gate_bias": "gb", "inner": 6, "rows": 8},
        ),
        Conv(src="m", dst="m", weight="kernel", taps=3),
        Add(a="x", b="m", dst="x"),
    )
    stem = (Embed(dst="x", table=EMBEDDING, rows=9, cols=8),)
    program = Program(stem, (layer,), (0,), (Logits(src="x", dst="logits", weight="lm_head.weight", rows=9),))
    recipe = Recipe.parse('[[rule]]\ntensors = ["*"]\nk = 16\nrows_per_table = 3', "test", program)
    shapes = {weight.name.removeprefix("model.layers.0."): weight.shape for weight in program.weights()}
    found = {name: recipe.rule("model.layers.0." + name, shapes[name]) for name in ("router", "kernel", "gb", "g", "d")}
    assert found["router"] == found["kernel"] == found["gb"] == DENSE
    assert found["g"] == Rule(k=16, rows_per_table=6)
    assert found["d"] == Rule(k=16, rows_per_table=8)
    assert Recipe.load("default", program, 16).rule("model.layers.0.d", shapes["d"]).k == 32


@pytest.mark.parametrize("name", shipped_names())
@pytest.mark.parametrize("k", [None, 2, 16, 24, 64, 256])
def test_shipped_recipes_take_every_k(name, k):
    recipe = Recipe.load(name, PROGRAM, k)
    assert recipe.rule(NORM, (64,)) == DENSE
    assert (recipe.rule(QUERY, (64, 64)) == DENSE) == (name == "dense")


def test_a_file_is_a_recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[[rule]]\ntensors = ["*"]\nk = 3\n')
    assert Recipe.load(path, PROGRAM).rule(QUERY, (4, 4)) == Rule(k=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k = ", "recipe test: "),
        ("kk = 3", "got kk"),
        ("k = 1\n[[rule]]\ntensors = ['*']", "k is 2 to 256; got 1"),
        ('[[rule]]\ntensors = ["*"]', "or the recipe a base k"),
        ("[[rule]]\nk = 4", "a rule has tensors, roles or layers"),
        ('[[rule]]\nroles = ["gate_proj"]\nk = 4', "roles are among embedding, .*; got gate_proj"),
        ('[[rule]]\nroles = "gate"\nk = 4', "roles are a list"),
        ('[[rule]]\nlayers = "middle"\nk = 4', "layers is one of first, last, ends; got middle"),
        ("rule = 3", "recipe test: "),
        ('rule = ["x"]', "recipe test: "),
        ('[[rule]]\ntensors = "x"\nk = 4', "tensors are a list"),
        ('[[rule]]\ntensors = ["*"]\nk = 4.5', "k is of type int"),
        ('[[rule]]\ntensors = ["*"]\nk = true', "k is of type int; got True"),
        ('[[rule]]\ntensors = ["*"]\ndense = "no"', "dense is of type bool; got 'no'"),
        ('[[rule]]\ntensors = ["*"]\nk = 16\ngrid = "no"\naffine = "row"', "grid is of type bool"),
        ('[[rule]]\ntensors = ["*"]\nk = 16\naffine = "group"\ngroup = 64.0', "group is of type int; got 64.0"),
        ('[[rule]]\ntensors = ["*"]\nk = 16\nexact_rows = true', "exact_rows is of type int"),
        ('[[rule]]\ntensors = ["*"]\nk = 16\ngrid = true\naffine = "row"\nbits = true', "bits is of type float"),
        ('[[rule]]\ntensors = ["*"]\nk = 16\nexceptions = nan', "exceptions is of type float; got nan"),
        ('k = 16\n[[rule]]\ntensors = ["*"]\nk_factor = nan', "k_factor is of type int"),
        ("k = 16.0", "k is of type int; got 16.0"),
        ("k = 0", "k is 2 to 256; got 0"),
        ("[[rule]]\ntensors = [1]\nk = 4", "tensors are a list of texts"),
        (
            f"k = 4\n[[rule]]\ntensors = {[f'{n}*' for n in range(1001)]}",
            "at most 1000 patterns besides names; got 1001",
        ),
        ('[[rule]]\ntensors = ["*"]\nk = 300', "k is 2 to 256; got 300"),
        ('[[rule]]\ntensors = ["*"]\nk = 16\ncolour = 1', "colour"),
        ('[[rule]]\ntensors = ["*"]\ndense = true\nk = 16', "a dense rule"),
        ('[[rule]]\ntensors = ["*"]\nk = 16\ngrid = true', "grid needs a factor"),
        ('[[rule]]\ntensors = ["*"]\nk = 256\ngrid = true\naffine = "row"', "at most 255"),
        ('[[rule]]\ntensors = ["*"]\nk = 16\naffine = "tensor"', "only with grid"),
        ('[[rule]]\ntensors = ["*"]\nk = 16\naffine = "group"', "group goes with"),
        ('[[rule]]\ntensors = ["*"]\nk = 16\naffine = "group"\ngroup = 48', "group is one of"),
        ('[[rule]]\ntensors = ["*"]\nk = 16\nexceptions = 0.5', "exceptions are a share, 0 to 0.125; got"),
        ('[[rule]]\ntensors = ["*"]\nk = 16\nexceptions = 0.07\nexact_rows = 1', "0 to 0.0625 beside exact_rows; got"),
    ],
)
def test_refusals_say_what_was_expected(text, message):
    with pytest.raises(UsageError, match=message) as refused:
        parse(text)
    assert "\n" not in str(refused.value)


def test_an_unknown_name_is_refused_with_those_known():
    with pytest.raises(UsageError, match=r"nope: no such recipe; .*default, dense"):
        Recipe.load("nope", PROGRAM)


def test_a_file_of_a_megabyte_is_enough(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(f"# {'x' * (1 << 20)}")
    with pytest.raises(UsageError, match=r"mine\.toml: expected at most 1048576 bytes"):
        Recipe.load(path, PROGRAM)


def test_names_cost_nothing():
    names = [f"model.layers.{n}.x.weight" for n in range(100_000)]
    assert parse(f"[[rule]]\ntensors = {[*names, QUERY]}\nk = 4").rule(QUERY, (4, 4)) == Rule(k=4)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"mine\.toml: "):
        Recipe.load(path, PROGRAM)
