"""ministral: a mistral whose layer_types gives the window to some layers only, as Ministral 8B. The reference reads one
that is named "mistral" so, unless it is inside another model.
"""

from __future__ import annotations

from dataclasses import dataclass

from rkf.converters.families import rope_scaling
from rkf.converters.families.blocks import assemble, attention, gated, pre_norm_layer
from rkf.converters.families.family import Family, GgufFields, GgufForm
from rkf.converters.families.keys import FULL, SLIDING
from rkf.converters.families.llama import unpermuted
from rkf.converters.families.mistral import FAMILY as MISTRAL
from rkf.converters.families.mistral import MistralKeys
from rkf.converters.families.windows import WINDOW, Windowed
from rkf.errors import UnsupportedError
from rkf.model.program import Program


@dataclass(frozen=True, kw_only=True)
class MinistralKeys(MistralKeys, Windowed):
    @property
    def kinds(self) -> tuple[str, ...]:
        """Without layer_types, the window is that of every layer."""
        every = FULL if self.sliding_window is None else SLIDING
        return (every,) * self.num_hidden_layers if self.layer_types is None else self.layer_types


def _program(config: MinistralKeys) -> Program:
    turns = rope_scaling.table(rope_scaling.whole(config), config)
    layers = (
        pre_norm_layer(config, attention(config, window=config.window(kind)), gated(config)) for kind in config.kinds
    )
    return assemble(config, layers, (turns,))


def _to_fields(config: MinistralKeys) -> GgufFields:
    windows = {config.window(kind) for kind in config.kinds}
    if len(windows) > 1:
        raise UnsupportedError("layer_types: a GGUF of this family cannot store a window for only some layers")
    return MISTRAL.gguf.to_fields(config).plus({WINDOW: windows.pop()})


# A GGUF that it writes is read as a mistral: llama.cpp has no own name for either.
_GGUF: GgufForm[MinistralKeys] = GgufForm(
    "llama", MISTRAL.gguf.to_config, _to_fields, unpermuted, lambda own: False, ignored=(WINDOW,), factors=True
)

FAMILY = Family(
    name="ministral",
    class_name="MinistralForCausalLM",
    keys=MinistralKeys,
    program=_program,
    gguf=_GGUF,
)
