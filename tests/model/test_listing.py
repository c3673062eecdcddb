"""A program as text: every op once, with what it reads, and what differs from the defaults."""

from rkf.model.listing import listing, summary
from rkf.model.ops import Add, Embed, Linear, Logits, Norm
from rkf.model.program import Frequencies, Program


def test_listing():
    linear = Linear(src="h", dst="o", weight="mix.weight", rows=4)
    layer = (Norm(src="x", dst="h", epsilon=1e-6, bias="norm.bias"), linear, Add(a="x", b="o", dst="x", scale=0.5))
    program = Program(
        stem=(Embed(dst="x", table="table", rows=7, cols=4),),
        kinds=(layer, (*layer[:2], Add(a="x", b="o", dst="x"))),
        order=(0, 0, 1, 0),
        top=(Logits(src="x", dst="logits", weight="head", rows=7),),
        ropes=(Frequencies((1.0, 0.25), 1.5, (0.5, 0.125), 64),),
    )
    program.check()
    assert summary(program) == "4 layers of 2 kinds, 8 ops"
    assert list(listing(program)) == [
        "stem",
        "  x = embed(table, rows=7, cols=4)",
        "layers 0-1, 3",
        "  h = norm(x, epsilon=1e-06, bias=norm.bias)",
        "  o = linear(h, mix.weight, rows=4)",
        "  x = add(x, o, scale=0.5)",
        "layers 2",
        "  h = norm(x, epsilon=1e-06, bias=norm.bias)",
        "  o = linear(h, mix.weight, rows=4)",
        "  x = add(x, o)",
        "top",
        "  logits = logits(x, head, rows=7)",
        "rope 0: 2 frequencies, the first 1, the last 0.25, factor 1.5, others past 64 positions",
    ]
