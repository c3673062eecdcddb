"""Programs written by hand for small random models of transformers, with their weights, to test interpreters.

Each makes use of other ops: windows and two ropes and norms with an offset (gemma3_text), experts with biases and sinks
(gpt_oss), experts (qwen3_moe), the delta rule (qwen3_5_text), short convolutions (lfm2).
"""

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rkf.model.ops import Add, Attention, Conv, Delta, Embed, Experts, Gate, Linear, Logits, Norm, Rope, Route
from rkf.model.program import Frequencies, Program, layer_prefix

BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = ["sliding_attention", "full_attention"] * 2
OPTIONS = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "attention_bias": True,
        "mlp_bias": True,
    },
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": SLIDING,
        "query_pre_attn_scalar": 24,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": SLIDING,
        "swiglu_limit": 1.0,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "qwen3_5_text": {
        "head_dim": 16,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
}


def random_model(family):
    """A model of transformers in f32 whose every tensor is random."""
    config = CONFIG_MAPPING[family](**BASE, **OPTIONS[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=random)
            if "norm" in name and name.endswith("weight"):
                tensor.add_(0.2 * noise)
            elif name.endswith("A_log"):
                tensor.copy_(torch.linspace(-1, 1, len(tensor)))
            else:
                tensor.copy_(noise * (0.25 if tensor.ndim > 1 else 0.3))
    return model


def small_model(family):
    """(model of transformers, Program, weights by name)."""
    model = random_model(family)
    weights = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    weights["lm_head.weight"] = model.get_output_embeddings().weight.detach().numpy().copy()
    builder = _Builder(family, model, weights)
    program = builder.program()
    program.check()
    needed = {weight.name: weight.shape for weight in program.weights()}
    found = {name: np.ascontiguousarray(builder.weights[name]) for name in needed}
    assert {name: each.shape for name, each in found.items()} == needed
    return model, program, found


class _Builder:
    def __init__(self, family, model, weights):
        self.family, self.model, self.weights = family, model, weights
        self.config = model.config
        self.hidden = self.config.hidden_size
        self.heads, self.kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        self.head_dim = getattr(self.config, "head_dim", None) or self.hidden // self.heads
        self.epsilon = getattr(self.config, "rms_norm_eps", None) or self.config.norm_eps
        self.offset = 1.0 if family in ("gemma3_text", "qwen3_5_text") else 0.0
        self.ropes = []

    def program(self):
        kinds = {}
        order = tuple(kinds.setdefault(self.layer(n), len(kinds)) for n in range(self.config.num_hidden_layers))
        last = "model.embedding_norm.weight" if self.family == "lfm2" else "model.norm.weight"
        scale = self.hidden**0.5 if self.family == "gemma3_text" else 1.0
        table = "model.embed_tokens.weight"
        return Program(
            stem=(Embed(dst="x", table=table, rows=self.config.vocab_size, cols=self.hidden, scale=scale),),
            kinds=tuple(kinds),
            order=order,
            top=(
                Norm(src="x", dst="h", weight=last, epsilon=self.epsilon, offset=self.offset),
                Logits(src="h", dst="logits", weight="lm_head.weight", rows=self.config.vocab_size),
            ),
            ropes=tuple(self.ropes),
        )

    def layer(self, number):
        self.prefix = layer_prefix(number)
        kind = (getattr(self.config, "layer_types", None) or ["full_attention"] * (number + 1))[number]
        names = {"lfm2": ("operator_norm", "ffn_norm")}.get(
            self.family, ("input_layernorm", "post_attention_layernorm")
        )
        ops = [self.norm("x", "h", names[0])]
        ops += {"conv": self.conv, "linear_attention": self.delta}.get(kind, lambda: self.attention(kind))()
        if self.family == "gemma3_text":
            ops += [self.norm("o", "o", "post_attention_layernorm"), Add(a="x", b="o", dst="x")]
            ops += [self.norm("x", "h", "pre_feedforward_layernorm"), *self.mlp()]
            return (*ops, self.norm("m", "m", "post_feedforward_layernorm"), Add(a="x", b="m", dst="x"))
        mixture = self.prefix + "mlp.experts.gate_up_proj" in self.weights
        ops += [Add(a="x", b="o", dst="x"), self.norm("x", "h", names[1])]
        return (*ops, *(self.mixture() if mixture else self.mlp()), Add(a="x", b="m", dst="x"))

    def norm(self, src, dst, name, group=None):
        return Norm(src=src, dst=dst, weight=f"{name}.weight", epsilon=self.epsilon, offset=self.offset, group=group)

    def linear(self, src, dst, name):
        bias = f"{name}.bias" if self.prefix + f"{name}.bias" in self.weights else None
        rows = len(self.weights[self.prefix + f"{name}.weight"])
        return Linear(src=src, dst=dst, weight=f"{name}.weight", rows=rows, bias=bias)

    def split(self, name, **parts):
        """Give rows of a fused matrix names of their own. parts: name -> rows."""
        for part, rows in parts.items():
            self.weights[f"{self.prefix}{part}.weight"] = self.weights[f"{self.prefix}{name}.weight"][rows]

    def attention(self, kind):
        ops, gated = [], self.family == "qwen3_5_text"
        if gated:
            rows = np.arange(2 * self.heads * self.head_dim).reshape(self.heads, 2, -1)
            fused = "self_attn.q_proj.weight"
            whole = self.weights[self.prefix + fused]
            self.weights[self.prefix + "g.weight"] = whole[rows[:, 1].reshape(-1)]
            self.weights[self.prefix + fused] = whole[rows[:, 0].reshape(-1)]
            ops.append(self.linear("h", "g", "g"))
        ops += [self.linear("h", part, f"self_attn.{part}_proj") for part in "qkv"]
        norms = ("q_layernorm", "k_layernorm") if self.family == "lfm2" else ("q_norm", "k_norm")
        if self.prefix + f"self_attn.{norms[0]}.weight" in self.weights:
            pairs = zip("qk", norms, strict=True)
            ops += [self.norm(part, part, f"self_attn.{name}", self.head_dim) for part, name in pairs]
        table = self.rope(kind)
        ops += [Rope(src=part, dst=part, table=table, head_dim=self.head_dim) for part in "qk"]
        scale = getattr(self.config, "query_pre_attn_scalar", self.head_dim) ** -0.5
        ops.append(
            Attention(
                **dict.fromkeys(("head_dim", "value_dim"), self.head_dim),
                **{"q": "q", "k": "k", "v": "v", "dst": "y", "heads": self.heads, "kv_heads": self.kv_heads},
                scale=scale,
                window=self.config.sliding_window if kind == "sliding_attention" else None,
                sinks="self_attn.sinks" if self.family == "gpt_oss" else None,
            )
        )
        if gated:
            ops.append(Gate(a="g", b="y", dst="y", act="sigmoid"))
        return [*ops, self.linear("y", "o", "self_attn." + ("out_proj" if self.family == "lfm2" else "o_proj"))]

    def rope(self, kind):
        """The number of the table that transformers uses for a kind of layer."""
        rope = self.model.model.rotary_emb if hasattr(self.model.model, "rotary_emb") else self.model.model.pos_emb
        prefix = f"{kind}_" if hasattr(rope, f"{kind}_inv_freq") else ""
        table = Frequencies(
            tuple(map(float, getattr(rope, f"{prefix}inv_freq"))),
            float(getattr(rope, f"{prefix}attention_scaling")),
        )
        if table not in self.ropes:
            self.ropes.append(table)
        return self.ropes.index(table)

    def conv(self):
        h = np.arange(self.hidden)
        self.split("conv.in_proj", b=h, c=self.hidden + h, s=2 * self.hidden + h)
        kernel = self.weights[self.prefix + "conv.conv.weight"]
        self.weights[self.prefix + "conv.conv.weight"] = kernel[:, 0]
        return [
            *(self.linear("h", part, part) for part in "bcs"),
            Gate(a="b", b="s", dst="s", act="identity"),
            Conv(src="s", dst="s", weight="conv.conv.weight", taps=kernel.shape[-1]),
            Gate(a="c", b="s", dst="y", act="identity"),
            self.linear("y", "o", "conv.out_proj"),
        ]

    def delta(self):
        name, config = "linear_attn.", self.config
        kernel = self.weights[self.prefix + name + "conv1d.weight"]
        self.weights[self.prefix + name + "conv1d.weight"] = kernel[:, 0]
        parts = (("c", "qkv"), ("z", "z"), ("a", "a"), ("b", "b"))
        norm = f"{name}norm.weight"
        return [
            *(self.linear("h", dst, f"{name}in_proj_{part}") for dst, part in parts),
            Conv(src="c", dst="c", weight=f"{name}conv1d.weight", taps=kernel.shape[-1], act="silu"),
            Delta(
                **{"src": "c", "a": "a", "b": "b", "dst": "y", "a_log": f"{name}A_log", "dt_bias": f"{name}dt_bias"},
                key_heads=config.linear_num_key_heads,
                value_heads=config.linear_num_value_heads,
                key_dim=config.linear_key_head_dim,
                value_dim=config.linear_value_head_dim,
            ),
            Norm(src="y", dst="y", weight=norm, epsilon=self.epsilon, group=config.linear_value_head_dim),
            Gate(a="z", b="y", dst="y", act="silu"),
            self.linear("y", "o", f"{name}out_proj"),
        ]

    def mlp(self):
        names = {"lfm2": [f"feed_forward.w{n}" for n in (1, 3, 2)]}
        gate, up, down = names.get(self.family, [f"mlp.{part}_proj" for part in ("gate", "up", "down")])
        act = "gelu_tanh" if self.family == "gemma3_text" else "silu"
        return [
            self.linear("h", "e", gate),
            self.linear("h", "f", up),
            Gate(a="e", b="f", dst="m", act=act),
            self.linear("m", "m", down),
        ]

    def mixture(self):
        p, m, oss = self.prefix, "mlp.", self.family == "gpt_oss"
        both, down = self.weights[f"{p}{m}experts.gate_up_proj"], self.weights[f"{p}{m}experts.down_proj"]
        experts, count = len(both), self.config.num_experts_per_tok
        stacks = {part: f"{m}experts.{part}" for part in ("gate", "up", "down")}
        biases = {f"{part}_bias": f"{name}_bias" for part, name in stacks.items()} if oss else {}
        if oss:
            bias, both, down = (
                self.weights[f"{p}{m}experts.gate_up_proj_bias"],
                both.swapaxes(1, 2),
                down.swapaxes(1, 2),
            )
            found = {"gate": both[:, 0::2], "up": both[:, 1::2], "down": down}
            found |= {"gate_bias": bias[:, 0::2], "up_bias": bias[:, 1::2]}
            found["down_bias"] = self.weights[f"{p}{m}experts.down_proj_bias"]
        else:
            found = dict(zip(("gate", "up"), np.split(both, 2, axis=1), strict=True)) | {"down": down}
        self.weights |= {f"{p}{m}experts.{part}": each for part, each in found.items()}
        name = f"{m}router" if oss else f"{m}gate"
        route = Route(
            **{"src": "h", "dst": "r", "weight": f"{name}.weight", "experts": experts, "count": count},
            score="chosen" if oss else "softmax",
            bias=f"{name}.bias" if oss else None,
            normalise=not oss,
        )
        act = {"limit": self.config.swiglu_limit, "alpha": 1.702, "shift": 1.0} if oss else {}
        rows, inner = down.shape[1:]
        sizes = {"inner": inner, "rows": rows}
        return [route, Experts(src="h", route="r", dst="m", act="silu", **stacks, **biases, **sizes, **act)]
