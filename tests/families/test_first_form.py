"""Files of version 1.0 carry no config.json: it is made from their metadata, so that they are exported too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rkf.converters.export import export_gguf, export_hf
from rkf.converters.source import open_source
from rkf.errors import UnsupportedError
from rkf.file.container import open_file
from rkf.file.writer import Writer
from rkf.format.constants import TOKENIZER
from rkf.format.matrix import Alias
from rkf.model.first_form import ModelConfig, RopeScaling
from rkf.model.metadata import ModelMetadata
from tests.format.first_form_metadata import metadata_of

from .common_keys import COMMON, ORIGINAL, WINDOW
from .models import loaded, logits_of, model_of, save

SIZES: dict[str, Any] = {
    "vocab_size": COMMON["vocab_size"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "context_length": 256,
    "norm_epsilon": 1e-6,
    "rope_theta": 1e4,
    "bos_id": 1,
    "eos_ids": (2,),
}
# Variants of the models that a 1.0 file could hold, with its numbers.
FILES: dict[str, dict[str, Any]] = {
    "llama": {
        "architecture": "llama",
        "rope_theta": 5e5,
        "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, ORIGINAL),
    },
    "llama-biases": {
        "architecture": "llama",
        "head_dim": 32,
        "norm_epsilon": 1e-4,
        "rope_scaling": RopeScaling("linear", 2.5),
    },
    "mistral": {"architecture": "mistral", "sliding_window": WINDOW},
    "qwen2-dynamic": {"architecture": "qwen2"},
    "qwen3-plain": {"architecture": "qwen3", "head_dim": 32},
}


def first_form(folder: Path, out: Path, **numbers: Any) -> Path:
    """A 1.0 file of a checkpoint's tensors."""
    source = open_source(folder)
    metadata = metadata_of(ModelConfig(**{**SIZES, **numbers}))
    with Writer(out, metadata={"model": metadata}, provenance={}) as file:
        for name in sorted([*source.tensors, *source.aliases]):
            file.add(name, Alias(source.aliases[name]) if name in source.aliases else source.read(name))
        file.blob(TOKENIZER, source.tokenizer_json)
    return out


@pytest.mark.parametrize("variant", FILES)
def test_both_exports(tmp_path: Path, variant: str) -> None:
    folder = save(model_of(variant), tmp_path / "model", "float16")
    out = first_form(folder, tmp_path / "m.rkf", **FILES[variant])
    export_hf(out, tmp_path / "back")
    np.testing.assert_array_equal(logits_of(loaded(tmp_path / "back")), logits_of(loaded(folder)))
    export_gguf(out, tmp_path / "m.gguf")
    source = open_source(tmp_path / "m.gguf")
    with open_file(out) as file:
        assert file.model is not None
        kinds, mine = file.model.program.kinds, source.model.program
        assert (mine.kinds, mine.order) == (kinds, file.model.program.order)
        assert (source.model.bos_id, source.model.eos_ids) == (file.model.bos_id, (2, 0))
        np.testing.assert_allclose(mine.ropes[0].frequencies, file.model.program.ropes[0].frequencies, rtol=1e-5)
        for name in source.tensors:
            np.testing.assert_array_equal(source.read(name).decode(), file.decode(name))


@pytest.mark.parametrize("variant", FILES)
def test_a_new_conversion_has_the_same_program(tmp_path: Path, variant: str) -> None:
    folder = save(model_of(variant), tmp_path / "model")
    source = open_source(folder)
    metadata = metadata_of(ModelConfig(**{**SIZES, **FILES[variant]}))
    assert source.model.program == ModelMetadata.of_first_form(metadata, source.tensors).program


def test_a_program_without_a_configuration_has_no_other_form(tmp_path: Path) -> None:
    source = open_source(save(model_of("llama-gelu"), tmp_path / "model"))
    with Writer(tmp_path / "m.rkf", metadata={"model": source.model.to_metadata()}, provenance={}) as file:
        for name in source.tensors:
            file.add(name, source.read(name))
        file.blob(TOKENIZER, source.tokenizer_json)
    for run, out in ((export_hf, "back"), (export_gguf, "m.gguf")):
        with pytest.raises(UnsupportedError, match=r"m\.rkf: it carries no config\.json"):
            run(tmp_path / "m.rkf", tmp_path / out)
        assert not (tmp_path / out).exists()
