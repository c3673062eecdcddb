"""A PEFT LoRA adapter, added to the weights of its base model: W + scale * B A. Knows no family.

The form is that of peft's `save_pretrained`: adapter_config.json, and adapter_model.safetensors with lora_A [r, cols]
and lora_B [rows, r] for each adapted module. What is more than plain LoRA is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from rkf.converters.description import describe
from rkf.converters.families.keys import flag, number, read, text
from rkf.converters.families.layout import Layout, Origin
from rkf.converters.families.layout_transforms import Shape
from rkf.converters.input_files import files_fingerprint, hash_file, read_json
from rkf.converters.shards import StoredTensor, tensors_of
from rkf.converters.source import ChangedSource, Source
from rkf.errors import SourceError, UnsupportedError, UsageError, naming
from rkf.file.identity import identity, refuse_changed
from rkf.format.matrix import F32, DenseTensor, from_f32
from rkf.model.metadata import ModelMetadata

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>A|B)(?:\.\w+)?\.weight")
# Options that change more than plain LoRA does, unless they have no value.
_MORE = (
    *("use_dora", "fan_in_fan_out", "modules_to_save", "lora_bias", "layer_replication", "target_parameters"),
    *("use_qalora", "use_bdlora", "trainable_token_indices", "alora_invocation_tokens", "arrow_config"),
    *("velora_config", "monteclora_config", "kasa_config"),
)
_MOST_ALPHA = 1e6
# Matching a name of n characters takes n^3 steps at most: two repeats and the one of peft, none of them inside another.
_REPEAT, _NESTED = re.compile(r"[*+?{]"), re.compile(r"\)[*+?{]|\(\?")
_MOST_REPEATING = 50  # patterns
_DTYPES = {"BF16": "bf16", "F16": "f16", "F32": "f32"}


@dataclass(frozen=True, kw_only=True)
class _AdapterKeys:
    """peft's LoraConfig, with its defaults."""

    peft_type: str = text("LORA")
    bias: str = text("none")
    lora_alpha: float = number(8)
    use_rslora: bool = flag(False, or_null=True)


class Adapter:
    """The products B A of an adapter, by the names of the modules that they belong to.

    Raises UsageError for what is no folder of an adapter, UnsupportedError for what is more than plain LoRA,
    SourceError for files that do not fit together.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / CONFIG).is_file():
            raise UsageError(f"{folder}: expected the folder of a PEFT adapter, with {CONFIG}")
        self.folder = folder
        self._before = {path: identity(path) for path in (folder / CONFIG, folder / WEIGHTS)}
        config = read_json(folder / CONFIG)
        with naming(folder / CONFIG):
            self._keys = read(_AdapterKeys, config)
            _alpha(self._keys.lora_alpha)
            self._alphas = _alphas(config.get("alpha_pattern"))
            if self._keys.peft_type != "LORA" or self._keys.bias != "none":
                raise UnsupportedError(
                    f"peft_type {self._keys.peft_type!r}, bias {self._keys.bias!r}: only LoRA without biases is applied"
                )
            for key in _MORE:
                if config.get(key):
                    raise UnsupportedError(
                        f"{key} {config[key]!r} cannot be applied: merge with peft's merge_and_unload"
                    )
        with naming(folder):
            self._halves = _halves(folder / WEIGHTS)

    @property
    def modules(self) -> frozenset[str]:
        """The adapted modules, such as "model.layers.0.self_attn.q_proj"."""
        return frozenset(self._halves)

    @cached_property
    def files(self) -> dict[str, str]:
        return {name: hash_file(self.folder / name) for name in (CONFIG, WEIGHTS)}

    def refuse_changed(self) -> None:
        refuse_changed(self._before)

    def shape(self, module: str) -> tuple[int, int]:
        """Rows and columns of a module's weights."""
        a, b = self._halves[module]
        return b.shape[0], a.shape[1]

    def halves(self, module: str) -> tuple[DenseTensor, DenseTensor]:
        """A: [rank, cols] and B: [rows, rank]."""
        a, b = (DenseTensor(_DTYPES[half.dtype], half.read()) for half in self._halves[module])
        return a, b

    def scale(self, module: str) -> float:
        """The factor of the product B A."""
        rank = self._halves[module][0].shape[0]
        alphas = (alpha for pattern, alpha in self._alphas.items() if re.match(rf"(.*\.)?({pattern})$", module))
        return next(alphas, self._keys.lora_alpha) / (sqrt(rank) if self._keys.use_rslora else rank)

    def delta(self, module: str) -> F32:
        """scale * B A, f32[rows, cols]."""
        a, b = self.halves(module)
        return np.matmul(b.decode(), a.decode()) * np.float32(self.scale(module))

    def places(self, layout: Layout, shapes: Mapping[str, Shape], label: str) -> dict[str, tuple[str, Origin]]:
        """The tensors of a program that it changes, each with its module and where that holds it. shapes: of all
        tensors. Raises SourceError for an adapter of another model. label: the model in messages.
        """
        found: dict[str, tuple[str, Origin]] = {}
        for name in shapes:
            origin = layout(name)[0]
            modules = [each.removesuffix(".weight") for each in origin.names]
            if not origin.stacked and len(modules) == 1 and modules[0] in self.modules:
                found[name] = modules[0], origin
        for module in sorted(self.modules - {module for module, _ in found.values()}):
            raise SourceError(f"{self.folder}: module {module} is not in {label}, or is a stack of experts")
        for name, (module, origin) in found.items():
            if origin.shape(self.shape(module)) != shapes[name]:
                expected, got = list(shapes[name]), list(self.shape(module))
                raise SourceError(f"{self.folder}: module {module} gives {got}, expected {expected} for {name}")
        return found


def _alphas(patterns: Any) -> dict[str, float]:
    """alpha_pattern: regular expressions of modules, each with its own lora_alpha."""
    if patterns is None:
        return {}
    if not isinstance(patterns, dict) or not all(type(alpha) in (int, float) for alpha in patterns.values()):
        raise SourceError(f"alpha_pattern: expected numbers by module, got {patterns!r}")
    repeats = [len(_REPEAT.findall(pattern)) for pattern in patterns]
    if sum(map(bool, repeats)) > _MOST_REPEATING or max(repeats, default=0) > 2 or any(map(_NESTED.search, patterns)):
        raise SourceError(
            "alpha_pattern: these regular expressions may take too long: merge with peft's merge_and_unload"
        )
    try:
        for pattern in patterns:
            re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise SourceError(f"alpha_pattern: {error}") from error
    return {pattern: _alpha(alpha) for pattern, alpha in patterns.items()}


def _alpha(alpha: float) -> float:
    if not abs(alpha) <= _MOST_ALPHA:
        raise SourceError(f"lora_alpha: expected a number up to {_MOST_ALPHA:g}, got {str(alpha)[:40]}")
    return alpha


def _halves(path: Path) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """Module -> lora_A, lora_B."""
    if not path.is_file():
        raise SourceError(f"{WEIGHTS} is missing: adapters are read as safetensors alone")
    found: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors_of(path).items():
        match = _NAME.fullmatch(name)
        if match is None or tensor.dtype not in _DTYPES or len(tensor.shape) != 2:
            raise UnsupportedError(f"tensor {name} ({tensor.dtype} {list(tensor.shape)}) is not half of a LoRA product")
        found.setdefault(match["module"], {})[match["half"]] = tensor
    pairs = {}
    for module, halves in sorted(found.items()):
        if halves.keys() != {"A", "B"} or halves["A"].shape[0] != halves["B"].shape[1] or not halves["A"].shape[0]:
            raise SourceError(f"{module}: expected lora_A [r, cols] and lora_B [rows, r], r at least 1")
        pairs[module] = halves["A"], halves["B"]
    return pairs


class AdaptedSource(ChangedSource):
    """`source` with an adapter's products added; sums are rounded to the source's dtype, as peft's merge does.

    Raises SourceError for an adapter of another model.
    """

    def __init__(self, source: Source, adapter: Adapter) -> None:
        super().__init__(source)
        self._adapter = adapter
        self.label = f"{source.label} with {adapter.folder.resolve().name}"
        layout = describe(json.loads(source.verbatim["config.json"]), source.label).layout
        shapes = {name: spec.shape for name, spec in source.tensors.items()}
        self._places = adapter.places(layout, shapes, source.label)

    @property
    def model(self) -> ModelMetadata:
        return self._source.model

    @property
    def files(self) -> Mapping[str, str]:
        return {**self._source.files, **self._adapter.files}

    def refuse_changed(self) -> None:
        self._source.refuse_changed()
        self._adapter.refuse_changed()

    @property
    def fingerprint(self) -> str:
        return files_fingerprint(self.files)

    def read(self, name: str) -> DenseTensor:
        tensor = self._source.read(name)
        if name not in self._places:
            return tensor
        module, origin = self._places[name]
        delta = origin.cut(self._adapter.delta(module))
        for step in origin.steps:
            delta = step.apply(delta)
        return DenseTensor(tensor.dtype, from_f32(tensor.decode() + delta, tensor.dtype))
