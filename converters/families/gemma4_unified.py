"""gemma4_unified_text: Gemma 4 12B, whose one decoder takes the inputs of all kinds. Gemma 4 without its options.

llama.cpp calls it gemma4, so a GGUF of it reads as that family; the program is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rkf.converters.families import gemma4
from rkf.converters.families.family import Family, Wrapper
from rkf.converters.families.gemma4_gguf import GGUF
from rkf.converters.families.gemma4_keys import Gemma4Keys
from rkf.converters.families.keys import ignored, size


@dataclass(frozen=True, kw_only=True)
class Gemma4UnifiedKeys(Gemma4Keys):
    max_position_embeddings: int = size(262144)
    sliding_window: int = size(1024)
    hidden_size_per_layer_input: int = ignored(0)
    enable_moe_block: bool = ignored(False)


FAMILY = Family(
    name="gemma4_unified_text",
    class_name="Gemma4UnifiedForCausalLM",
    keys=Gemma4UnifiedKeys,
    program=gemma4.program,
    layout=gemma4.layout,
    unused=gemma4.unused,
    gguf=replace(GGUF, claims=lambda own: False),
    wrapper=Wrapper(
        model_type="gemma4_unified",
        prefixes=("model.language_model.",),
        dropped=("model.embed_vision.", "model.embed_audio."),
        tied=True,
    ),
)
