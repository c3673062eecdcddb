"""Families that this project does not list: programs written by hand from spec/program.md give transformers' logits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, GPTJConfig, GPTNeoXConfig, StableLmConfig

import rkf
from rkf.file.writer import Writer
from rkf.format.matrix import DenseTensor
from tests.spec import reference
from tests.spec.document import SPEC, VECTORS

HIDDEN, HEADS, HEAD_DIM, INNER, VOCABULARY, LAYERS = 32, 4, 8, 48, 64, 2
F32 = NDArray[np.float32]
Map = dict[str, Any]
SIZES = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "intermediate_size": INNER, "vocab_size": VOCABULARY}
TOKENS = [3, 9, 27, 17, 51, 25, 11, 33, 35, 41, 59, 49]


def norm(src: str, dst: str, name: str) -> Map:
    names = {"weight": f"{name}.weight", "bias": f"{name}.bias"}
    return {"op": "norm", "src": src, "dst": dst, **names, "epsilon": 1e-5, "centred": True}


def linear(src: str, dst: str, name: str, rows: int, bias: bool = True) -> Map:
    biased = {"bias": f"{name}.bias"} if bias else {}
    return {"op": "linear", "src": src, "dst": dst, "weight": f"{name}.weight", **biased, "rows": rows}


def heads_turned(**keys: Any) -> list[Map]:
    return [{"op": "rope", "src": part, "dst": part, "table": 0, "head_dim": HEAD_DIM, **keys} for part in "qk"]


def attends(kv_heads: int) -> Map:
    sizes = {"heads": HEADS, "kv_heads": kv_heads, "head_dim": HEAD_DIM, "value_dim": HEAD_DIM}
    return {"op": "attention", "q": "q", "k": "k", "v": "v", "dst": "a", **sizes, "scale": HEAD_DIM**-0.5}


def add(a: str, b: str, dst: str) -> Map:
    return {"op": "add", "a": a, "b": b, "dst": dst}


def gpt_neox_layer() -> list[Map]:
    """The example of section 14."""
    return [
        norm("x", "h", "input_layernorm"),
        *(linear("h", part, f"attention.{part}", HIDDEN) for part in "qkv"),
        *heads_turned(),
        attends(HEADS),
        linear("a", "o", "attention.dense", HIDDEN),
        norm("x", "h", "post_attention_layernorm"),
        linear("h", "m", "mlp.dense_h_to_4h", INNER),
        {"op": "gate", "a": "m", "dst": "m", "act": "gelu"},
        linear("m", "d", "mlp.dense_4h_to_h", HIDDEN),
        add("o", "d", "o"),
        add("x", "o", "x"),
    ]


def gpt_neox(state: dict[str, F32]) -> tuple[list[Map], dict[str, F32]]:
    """A layer, and the tensors by the names that its program gives them."""
    given = {name.replace("gpt_neox.layers", "model.layers"): value for name, value in state.items()}
    for number in range(LAYERS):
        prefix = f"model.layers.{number}.attention."
        for kind in ("weight", "bias"):
            fused = given.pop(f"{prefix}query_key_value.{kind}").reshape(HEADS, 3, HEAD_DIM, -1)
            for place, part in enumerate("qkv"):
                split = fused[:, place].reshape(HIDDEN, -1)
                given[f"{prefix}{part}.{kind}"] = split if kind == "weight" else split[:, 0]
    renamed = {"gpt_neox.embed_in.": "embed.", "gpt_neox.final_layer_norm.": "norm.", "lm_head.": "head."}
    for old, new in renamed.items():
        given = {name.replace(old, new): value for name, value in given.items()}
    return gpt_neox_layer(), given


def stablelm(state: dict[str, F32]) -> tuple[list[Map], dict[str, F32]]:
    layer = [
        norm("x", "h", "input_layernorm"),
        linear("h", "q", "self_attn.q_proj", HIDDEN),
        *(linear("h", part, f"self_attn.{part}_proj", HIDDEN // 2) for part in "kv"),
        *heads_turned(),
        attends(HEADS // 2),
        linear("a", "o", "self_attn.o_proj", HIDDEN, bias=False),
        add("x", "o", "x"),
        norm("x", "h", "post_attention_layernorm"),
        linear("h", "g", "mlp.gate_proj", INNER, bias=False),
        linear("h", "u", "mlp.up_proj", INNER, bias=False),
        {"op": "gate", "a": "g", "b": "u", "dst": "m", "act": "silu"},
        linear("m", "d", "mlp.down_proj", HIDDEN, bias=False),
        add("x", "d", "x"),
    ]
    renamed = {"model.embed_tokens.": "embed.", "model.norm.": "norm.", "lm_head.": "head."}
    given = dict(state)
    for old, new in renamed.items():
        given = {name.replace(old, new): value for name, value in given.items()}
    return layer, given


def gptj(state: dict[str, F32]) -> tuple[list[Map], dict[str, F32]]:
    """Rope of neighbours, one norm for both branches, gelu_new, and a head with a bias."""
    layer = [
        norm("x", "h", "ln_1"),
        *(linear("h", part, f"attn.{part}_proj", HIDDEN, bias=False) for part in "qkv"),
        *heads_turned(pairs="neighbours"),
        attends(HEADS),
        linear("a", "o", "attn.out_proj", HIDDEN, bias=False),
        linear("h", "m", "mlp.fc_in", INNER),
        {"op": "gate", "a": "m", "dst": "m", "act": "gelu_tanh"},
        linear("m", "d", "mlp.fc_out", HIDDEN),
        add("o", "d", "o"),
        add("x", "o", "x"),
    ]
    renamed = {"transformer.h.": "model.layers.", "transformer.wte.": "embed.", "transformer.ln_f.": "norm."}
    renamed["lm_head."] = "head."
    given = dict(state)
    for old, new in renamed.items():
        given = {name.replace(old, new): value for name, value in given.items()}
    return layer, given


ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
Build = Callable[[dict[str, F32]], tuple[list[Map], dict[str, F32]]]
FAMILIES: dict[str, tuple[Any, Build]] = {
    "gpt_neox": (GPTNeoXConfig(num_hidden_layers=LAYERS, rope_parameters=ROPE, **SIZES), gpt_neox),
    "stablelm": (
        StableLmConfig(
            num_hidden_layers=LAYERS, num_key_value_heads=HEADS // 2, use_qkv_bias=True, rope_parameters=ROPE, **SIZES
        ),
        stablelm,
    ),
    "gptj": (
        GPTJConfig(n_layer=LAYERS, n_inner=INNER, rotary_dim=HEAD_DIM // 2, **SIZES),
        gptj,
    ),
}


def program(layer: list[Map], tensors: dict[str, F32]) -> Map:
    biased = {"bias": "head.bias"} if "head.bias" in tensors else {}
    return {
        "stem": [{"op": "embed", "dst": "x", "table": "embed.weight", "rows": VOCABULARY, "cols": HIDDEN}],
        "kinds": [layer],
        "order": [0] * LAYERS,
        "ropes": [{"frequencies": [10000 ** (-2 * i / (HEAD_DIM / 2)) for i in range(HEAD_DIM // 4)]}],
        "top": [
            norm("x", "h", "norm"),
            {"op": "logits", "src": "h", "dst": "logits", "weight": "head.weight", "rows": VOCABULARY, **biased},
        ],
    }


def write(path: Path, model: Map, tensors: dict[str, F32]) -> None:
    metadata = {
        "add_bos": False, "context_length": 64, "eos_ids": [], "generation": {}, "program": model, "special_tokens": {},
    }  # fmt: skip
    with rkf.open(VECTORS / "model.rkf") as container:
        tokenizer = container.blob("tokenizer.json")
    assert tokenizer is not None
    with Writer(path, metadata={"model": metadata}, provenance={}) as writer:
        for name in sorted(tensors):
            writer.add(name, DenseTensor("f32", np.ascontiguousarray(tensors[name], np.float32)))
        writer.blob("tokenizer.json", tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    config, build = FAMILIES[family]
    torch.manual_seed(7)
    original = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in original.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    layer, tensors = build({name: value.numpy() for name, value in original.state_dict().items()})
    write(tmp_path / "model.rkf", program(layer, tensors), tensors)
    expected = original(torch.tensor([TOKENS])).logits[0].numpy()
    bound = 1e-5 * abs(expected).max()
    assert abs(reference.run(tmp_path / "model.rkf", TOKENS) - expected).max() < bound
    with rkf.load(tmp_path / "model.rkf", exact=True) as model:
        assert abs(model.logits(TOKENS) - expected).max() < bound


def test_the_example_is_the_layer() -> None:
    """Section 14 writes the layer that is tested here, `likewise` for what comes once more."""
    text = (SPEC / "program.md").read_text().partition("## 14.")[2]
    told = [dict(pair.split(": ") for pair in body.split(", ")) for body in re.findall(r"\{(op: [^}]*)\}", text)]
    layer = [op for op in gpt_neox_layer() if op["dst"] not in ("k", "v")]
    assert [op["op"] for op in told] == [op["op"] for op in layer]
    for written, op in zip(told, layer, strict=True):
        assert written.keys() == op.keys()
        assert {key: value for key, value in written.items() if isinstance(op[key], str)} == {
            key: value for key, value in op.items() if isinstance(value, str)
        }
