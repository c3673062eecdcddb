"""Small random models of every family, two or more variants each, as transformers saves them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from tests.converters.conftest import write_tokenizer

from .common_keys import COMMON, TOKENS
from .dense_variants import DENSE
from .gemma_variants import GEMMA
from .mixture_variants import MIXTURES
from .recurrent_variants import RECURRENT

# name -> model_type, keys beyond the common ones. Each option of a family is used by one variant at least.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = DENSE | GEMMA | MIXTURES | RECURRENT


def model_of(variant: str) -> Any:
    """A model in f32 whose every tensor (norms and biases too) is random."""
    torch.manual_seed(0)
    name, keys = VARIANTS[variant]
    return randomised(transformers.AutoConfig.for_model(name, **{**COMMON, **keys}))


def randomised(config: Any, auto: Any = transformers.AutoModelForCausalLM) -> Any:
    model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        stored = [buffer for name, buffer in model.named_buffers() if name in model.state_dict()]
        for parameter in (*model.parameters(), *stored):
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1))
    return model.eval()


def save(model: Any, folder: Path, dtype: str = "float32") -> Path:
    """The folder that transformers writes, with a tokenizer."""
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def tokens() -> list[int]:
    return [int(each) for each in np.random.Generator(np.random.Philox(7)).integers(0, COMMON["vocab_size"], TOKENS)]


def logits_of(model: Any) -> NDArray[np.float32]:
    """f32[TOKENS, VOCAB], by transformers."""
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.tensor([tokens()]), use_cache=False).logits[0].float().numpy()
    return found


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()


def edit_json(path: Path, **changes: Any) -> None:
    content: Mapping[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))
