"""A PEFT LoRA adapter, added to the weights of its base model: W + scale * B A. Knows no family.

The form is that of peft's `save_pretrained`: adapter_config.json, and adapter_model.safetensors with lora_A [r, cols]
and lora_B [rows, r] for each adapted module. What is more than plain LoRA is refused by name.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from rkf.converters.description import describe
from rkf.converters.families.keys import flag, number, optional_size, read, text
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
# Ways to begin a training that change the model's own weights, also where peft loads the adapter.
_CHANGING = ("pissa", "corda", "olora", "loftq")
# Matching a name of n characters takes n^3 steps at most: two repeats and the one of peft, none of them inside another.
_REPEAT, _NESTED = re.compile(r"[*+?{]"), re.compile(r"\)[*+?{]|\(\?")
_MOST_REPEATING = 50  # patterns
_MOST_PATTERNS, _MOST_CHARACTERS = 1000, 100_000  # of a key, in all: each is tried on every module
_DTYPES = {"BF16": "bf16", "F16": "f16", "F32": "f32"}


@dataclass(frozen=True, kw_only=True)
class _AdapterKeys:
    """peft's LoraConfig, with its defaults."""

    peft_type: str = text("LORA")
    bias: str = text("none")
    r: int | None = optional_size()
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
            self._alphas = {pattern: _alpha(alpha) for pattern, alpha in _patterns(config, "alpha_pattern").items()}
            self._ranks = _patterns(config, "rank_pattern")
            if self._keys.peft_type != "LORA" or self._keys.bias != "none":
                raise UnsupportedError(
                    f"peft_type {self._keys.peft_type!r}, bias {self._keys.bias!r}: only LoRA without biases is applied"
                )
            for key in _MORE:
                if config.get(key):
                    shown = reprlib.repr(config[key])
                    raise UnsupportedError(f"{key} {shown} cannot be applied: merge with peft's merge_and_unload")
            began = config.get("init_lora_weights")
            if isinstance(began, str) and began.lower().startswith(_CHANGING):
                raise UnsupportedError(
                    f"init_lora_weights {reprlib.repr(began)} also changes the model's own weights: merge with peft's "
                    "merge_and_unload, or save the adapter with path_initial_model_for_weight_conversion"
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
        """A: [rank, cols] and B: [rows, rank]. Raises SourceError for values that are not finite."""
        a, b = (DenseTensor(_DTYPES[half.dtype], half.read()) for half in self._halves[module])
        for name, half in (("lora_A", a), ("lora_B", b)):
            if not np.isfinite(half.decode()).all():
                raise SourceError(f"{self.folder / WEIGHTS}: {module}, {name}: NaN or infinite values: it is damaged")
        return a, b

    def scale(self, module: str) -> float:
        """The factor of the product B A."""
        rank = self._halves[module][0].shape[0]
        alpha = _of(module, self._alphas, self._keys.lora_alpha)
        return alpha / (sqrt(rank) if self._keys.use_rslora else rank)

    def delta(self, module: str) -> F32:
        """scale * B A, f32[rows, cols]; not finite where it overflows."""
        a, b = self.halves(module)
        with np.errstate(over="ignore", invalid="ignore"):
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
            rank, told = self._halves[module][0].shape[0], _of(module, self._ranks, self._keys.r)
            if told is not None and rank != told:
                raise SourceError(f"{self.folder}: module {module} has rank {rank}, but {CONFIG} says {told}")
        return found


def _of(module: str, values: Mapping[re.Pattern[str], Any], default: Any) -> Any:
    """The value of the first pattern that a module's name matches."""
    return next((value for pattern, value in values.items() if pattern.match(module)), default)


def _patterns(config: Mapping[str, Any], key: str) -> dict[re.Pattern[str], float]:
    """alpha_pattern or rank_pattern: regular expressions of modules, as peft matches them, with a number for each."""
    patterns = config.get(key)
    if patterns is None:
        return {}
    if not isinstance(patterns, dict) or not all(type(value) in (int, float) for value in patterns.values()):
        raise SourceError(f"{key}: expected numbers by module, got {reprlib.repr(patterns)}")
    if len(patterns) > _MOST_PATTERNS or sum(map(len, patterns)) > _MOST_CHARACTERS:
        raise SourceError(f"{key}: expected at most {_MOST_PATTERNS} patterns of {_MOST_CHARACTERS} characters in all")
    repeats = [len(_REPEAT.findall(pattern)) for pattern in patterns]
    if sum(map(bool, repeats)) > _MOST_REPEATING or max(repeats, default=0) > 2 or any(map(_NESTED.search, patterns)):
        raise SourceError(f"{key}: these regular expressions may take too long: merge with peft's merge_and_unload")
    try:
        return {re.compile(rf"(.*\.)?({pattern})$"): value for pattern, value in patterns.items()}
    except RecursionError as error:
        raise SourceError(f"{key}: a regular expression is nested too deep") from error
    except (re.error, OverflowError) as error:
        raise SourceError(f"{key}: {error}") from error


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
        halves = found.setdefault(match["module"], {})
        if match["half"] in halves:
            raise SourceError(f"{match['module']}: two tensors are its lora_{match['half']}")
        halves[match["half"]] = tensor
    if not found:
        raise SourceError(f"{WEIGHTS}: expected a LoRA product, got no tensor")
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
        with np.errstate(over="ignore", invalid="ignore"):  # clustering refuses what is not finite, by name
            for step in origin.steps:
                delta = step.apply(delta)
            return DenseTensor(tensor.dtype, from_f32(tensor.decode() + delta, tensor.dtype))
