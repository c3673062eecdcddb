"""glm4_moe_lite: GLM 4.7 Flash. DeepSeek V3 with other sizes; which layers are dense is a list of words.

A GGUF has the same architecture for both, so a file of this family is read as the other one, which computes the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from rkf.converters.families.deepseek_v3 import GGUF, DeepseekV3Keys, layout, program
from rkf.converters.families.family import Family
from rkf.converters.families.grouped_experts import is_beyond
from rkf.converters.families.keys import flag, ignored, layer_types, number, optional_size, size
from rkf.errors import SourceError
from rkf.model.program import MAX_LAYERS

_DENSE, _SPARSE = "dense", "sparse"


@dataclass(frozen=True, kw_only=True)
class Glm4MoeLiteKeys(DeepseekV3Keys):
    vocab_size: int = size(154880)
    hidden_size: int = size(2048)
    intermediate_size: int = size(10240)
    moe_intermediate_size: int = size(1536)
    num_hidden_layers: int = size(47, most=MAX_LAYERS)
    num_attention_heads: int = size(20)
    num_key_value_heads: int | None = optional_size(20)
    max_position_embeddings: int = size(202752)
    rms_norm_eps: float = number(1e-5)
    q_lora_rank: int | None = optional_size(768)
    qk_rope_head_dim: int = size(64, name="head_dim", aliases=("qk_rope_head_dim",))
    qk_nope_head_dim: int = size(192)
    rope_interleave: bool = flag(True)
    v_head_dim: int = size(256)
    n_routed_experts: int = size(64, name="num_local_experts", aliases=("n_routed_experts",), most=1 << 16)
    num_experts_per_tok: int = size(4)
    n_group: int = size(1)
    topk_group: int = size(1)
    routed_scaling_factor: float = number(1.8)
    first_k_dense_replace: int = ignored(1)
    mlp_layer_types: tuple[str, ...] | None = layer_types(_DENSE, _SPARSE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mlp_layer_types is not None and len(self.mlp_layer_types) < self.num_hidden_layers:
            raise SourceError(
                f"mlp_layer_types: expected at least {self.num_hidden_layers} words, got {len(self.mlp_layer_types)}"
            )

    def is_sparse(self, layer: int) -> bool:
        return layer > 0 if self.mlp_layer_types is None else self.mlp_layer_types[layer] == _SPARSE


FAMILY = Family(
    name="glm4_moe_lite",
    class_name="Glm4MoeLiteForCausalLM",
    keys=Glm4MoeLiteKeys,
    program=program,
    layout=layout,
    gguf=GGUF,
    unused=is_beyond,
)
