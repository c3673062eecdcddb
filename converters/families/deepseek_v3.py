"""deepseek_v3: DeepSeek V3 and R1. Latent attention (MLA), and experts in groups.

Keys and values are products of one latent of each position. The matrices that expand it are moved to the queries and to
the result of attention, which gives the same numbers; so a sequence keeps the latent and one turned key for all heads.
Source: section 2.1 of arXiv 2405.04434.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import Layer, assemble, linear, pre_norm_layer
from rkf.converters.families.family import Family, GgufFields, GgufForm, GgufModel
from rkf.converters.families.gguf_config import RMS_EPSILON
from rkf.converters.families.gguf_experts import is_by_sigmoid
from rkf.converters.families.gguf_rope import rope_config, rope_fields, shortest
from rkf.converters.families.gguf_yarn import MAGNITUDE, MULTIPLIER
from rkf.converters.families.grouped_experts import (
    GroupedExperts,
    expert_layout,
    feed_forward,
    gguf_expert_layout,
    grouped_config,
    grouped_fields,
    is_beyond,
)
from rkf.converters.families.keys import flag, optional_size, size, token, tokens
from rkf.converters.families.layout import Layout, Origin, as_named
from rkf.converters.families.layout_transforms import ByHead, Transposed
from rkf.errors import SourceError, UnsupportedError
from rkf.model.op import Op
from rkf.model.ops import Attention, Concat, Linear, Norm, Rope
from rkf.model.program import MAX_LAYERS, Program

_EPSILON = 1e-6  # of the norms of latents, whatever the configuration has
_RANK, _QUERY_RANK, _TURNED = "attention.kv_lora_rank", "attention.q_lora_rank", "rope.dimension_count"
_KEY, _VALUE = "attention.key_length", "attention.value_length"
_WARMTH = "attention.temperature_scale"
_SEPARATE = 0.1  # what llama.cpp's converter multiplies mscale_all_dim by, in this architecture alone


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Keys(GroupedExperts):
    vocab_size: int = size(129280)
    hidden_size: int = size(7168)
    intermediate_size: int = size(18432)
    num_hidden_layers: int = size(61, most=MAX_LAYERS)
    num_attention_heads: int = size(128)
    num_key_value_heads: int | None = optional_size(128)
    max_position_embeddings: int = size(4096)
    attention_bias: bool = flag(False)
    kv_lora_rank: int = size(512)
    q_lora_rank: int | None = optional_size(1536)
    qk_rope_head_dim: int = size(64)
    qk_nope_head_dim: int = size(128)
    v_head_dim: int = size(128)
    rope_interleave: bool = flag(True, or_null=True)
    bos_token_id: int | None = token(0)
    eos_token_id: tuple[int, ...] = tokens(1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv_heads != self.num_attention_heads:
            raise SourceError(f"num_key_value_heads: expected {self.num_attention_heads}, got {self.kv_heads}")
        if self.head_dim not in (None, self.qk_rope_head_dim):
            raise SourceError(f"head_dim: expected {self.qk_rope_head_dim}, as qk_rope_head_dim, got {self.head_dim}")

    @property
    def head_size(self) -> int:
        """The width of the part of a head that rope turns."""
        return self.qk_rope_head_dim


def program(config: DeepseekV3Keys) -> Program:
    rope = rope_scaling.whole(config)
    turns = rope_scaling.table(rope, config)
    attends, layers = _attention(config, _scale(config, rope)), range(config.num_hidden_layers)
    return assemble(config, [pre_norm_layer(config, attends, feed_forward(config, n)) for n in layers], (turns,))


def _attention(config: DeepseekV3Keys, scale: float) -> Layer:
    """Values: l, the latent of queries; n, the part of queries that rope leaves; c, the latent of keys and values.

    The two matrices of each head that expand c are k_b_proj, applied to n instead, and v_b_proj, applied to the result.
    """
    heads, latent, turned = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    pairs = "neighbours" if config.rope_interleave else "halves"
    source, ops = "h", list[Op]()
    if config.q_lora_rank is not None:
        source = "l"
        ops += [
            linear("h", source, "self_attn.q_a_proj", config.q_lora_rank, config.attention_bias),
            _norm("q", source),
        ]
    ops += [
        linear(source, "n", "self_attn.q_nope_proj", heads * config.qk_nope_head_dim, False),
        linear(source, "q", "self_attn.q_rope_proj", heads * turned, False),
        linear("h", "c", "self_attn.kv_a_proj", latent, config.attention_bias),
        linear("h", "k", "self_attn.k_rope_proj", turned, config.attention_bias),
        _norm("kv", "c"),
        Linear(src="n", dst="n", weight="self_attn.k_b_proj.weight", rows=heads * latent, parts=heads),
        *(Rope(src=part, dst=part, table=0, head_dim=turned, pairs=pairs) for part in "qk"),
        Concat(a="n", b="q", dst="q", heads=heads),
        Concat(a="c", b="k", dst="k", heads=1),
        Attention(
            q="q",
            k="k",
            v="c",
            dst="a",
            heads=heads,
            kv_heads=1,
            head_dim=latent + turned,
            value_dim=latent,
            scale=scale,
        ),
        Linear(src="a", dst="a", weight="self_attn.v_b_proj.weight", rows=heads * config.v_head_dim, parts=heads),
        linear("a", "o", "self_attn.o_proj", config.hidden_size, config.attention_bias),
    ]
    return tuple(ops)


def _norm(part: str, value: str) -> Norm:
    return Norm(src=value, dst=value, weight=f"self_attn.{part}_a_layernorm.weight", epsilon=_EPSILON)


def _scale(config: DeepseekV3Keys, rope: Mapping[str, Any]) -> float:
    """Of scores; yarn's mscale_all_dim multiplies it by a square, as mscale of the rope multiplies queries and keys."""
    found = float((config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5)
    if rope["rope_type"] == "default" or not rope.get("mscale_all_dim"):
        return found
    grown = rope_scaling.grown(rope, "mscale_all_dim", rope_scaling.positive(rope, "factor"))
    return found * grown * grown


def layout(config: DeepseekV3Keys) -> Layout:
    return expert_layout(config, _attention_layout(config, whole=True))


def _gguf_layout(config: DeepseekV3Keys) -> Layout:
    return gguf_expert_layout(_attention_layout(config, whole=False))


def _attention_layout(config: DeepseekV3Keys, *, whole: bool) -> Layout:
    """Parts of fused matrices. whole: kv_b_proj is one matrix, of which the keys' part lies turned."""
    heads, plain, latent = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank
    queries = "self_attn.q_proj" if config.q_lora_rank is None else "self_attn.q_b_proj"
    of_query = {"q_nope_proj": slice(0, plain), "q_rope_proj": slice(plain, plain + config.qk_rope_head_dim)}
    of_latent = {"kv_a_proj": slice(0, latent), "k_rope_proj": slice(latent, latent + config.qk_rope_head_dim)}
    of_both = {"k_b_proj": slice(0, plain), "v_b_proj": slice(plain, plain + config.v_head_dim)}

    def parts(name: str) -> tuple[Origin, ...]:
        *_, module, kind = name.split(".")
        if module in of_query:
            return (Origin((f"{queries}.{kind}",), (of_query[module],), heads=heads),)
        if module in of_latent:
            return (Origin((f"self_attn.kv_a_proj_with_mqa.{kind}",), (of_latent[module],)),)
        if module not in of_both:
            return as_named(name)
        steps = (ByHead(heads), Transposed()) if module == "k_b_proj" else (ByHead(heads),)
        fused = Origin(("self_attn.kv_b_proj.weight",), (of_both[module],), steps, heads=heads)
        return (fused,) if whole else (*as_named(name), fused)

    return parts


def _to_config(model: GgufModel) -> dict[str, Any]:
    """Older files have kv_b_proj as one matrix, and the widths of whole heads where newer ones have the latent's."""
    own, turned = model.own, _width(model.own, _TURNED)
    rope = rope_config(model, turned)
    if own.get(_WARMTH):
        raise UnsupportedError(f"{_WARMTH}: {own[_WARMTH]} is not supported in this architecture; expected none")
    if rope["rope_type"] == "yarn":
        if not own.get(MULTIPLIER) or "attention_factor" in rope:
            raise UnsupportedError(
                f"yarn without {MULTIPLIER}, or with {MAGNITUDE}, is not supported in this architecture"
            )
        scale = shortest(own[MULTIPLIER] / _SEPARATE)
        rope |= {"mscale": scale, "mscale_all_dim": scale}
    return {
        **grouped_config(own),
        "num_key_value_heads": own["attention.head_count"],
        "head_dim": turned,
        "kv_lora_rank": _width(own, _RANK),
        "q_lora_rank": own.get(_QUERY_RANK) if "blk.0.attn_q_a.weight" in model.tensors else None,
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": _width(own, f"{_KEY}_mla", _KEY) - turned,
        "v_head_dim": _width(own, f"{_VALUE}_mla", _VALUE),
        "attention_bias": False,
        "rope_interleave": True,
        **rope_scaling.spelt(rope),
    }


def _width(own: Mapping[str, Any], *keys: str) -> int:
    """The first of these fields that is there."""
    found = next((own[key] for key in keys if key in own), None)
    if not isinstance(found, int):
        raise SourceError(f"field {keys[0]}: expected an integer, got {found!r}")
    return found


def _to_fields(config: DeepseekV3Keys) -> GgufFields:
    config.refuse(config.attention_bias, "attention_bias", "false: llama.cpp has no biases here")
    config.refuse(not config.rope_interleave, "rope_interleave", "true, as llama.cpp computes it")
    config.refuse(config.rms_norm_eps != _EPSILON, "rms_norm_eps", f"{_EPSILON:g}: llama.cpp has one for all norms")
    turned, latent = config.qk_rope_head_dim, config.kv_lora_rank
    rope = rope_scaling.whole(config)
    found = rope_fields({key: each for key, each in rope.items() if not key.startswith("mscale")}, turned)
    if rope["rope_type"] == "yarn":
        scale = rope.get("mscale_all_dim")
        if not scale or rope.get("mscale") != scale or rope.get("attention_factor") is not None:
            raise UnsupportedError(
                "rope_parameters: expected mscale as mscale_all_dim, and no attention_factor, for a GGUF"
            )
        found = found.plus({MULTIPLIER: _SEPARATE * scale})
    own = {
        **grouped_fields(config),
        RMS_EPSILON: config.rms_norm_eps,
        "attention.head_count_kv": 1,
        _KEY: latent + turned,
        _VALUE: latent,
        f"{_KEY}_mla": config.qk_nope_head_dim + turned,
        f"{_VALUE}_mla": config.v_head_dim,
        _RANK: latent,
        _QUERY_RANK: config.q_lora_rank,
    }
    return found.plus(own)


GGUF = GgufForm("deepseek2", _to_config, _to_fields, _gguf_layout, claims=is_by_sigmoid)

FAMILY = Family(
    name="deepseek_v3",
    class_name="DeepseekV3ForCausalLM",
    keys=DeepseekV3Keys,
    program=program,
    layout=layout,
    gguf=GGUF,
    unused=is_beyond,
)
