"""Recipes: which tensor is clustered how. A recipe is data (TOML): ordered patterns over tensor names. Knows no
weights.

    description = "one line"
    k = 16                                  # the base K: `--k` replaces it

    [[rule]]                                # the first rule with a matching pattern decides
    tensors = ["model.embed_tokens.weight"] # shell patterns over canonical tensor names
    k_factor = 8                            # K = 8 times the base, 256 at most; or `k = 64`, or `dense = true`
    grid = true                             # centroids are integers in -127..127 (K is then 255 at most)
    affine = "row"                          # "none", "tensor" (with grid alone), "row", "group"
    group = 64                              # columns that share a factor, with affine = "group"
    affine_dtype = "f16"                    # or "f32"
    exceptions = 0.001                      # the share of weights that stay exact
    rows_per_table = 1536                   # rows that share a list of centroids; all of them by default

A tensor that no rule names, and every tensor of one dimension, stays dense.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any

from rkf.errors import UsageError
from rkf.format import GROUP_SIZES, MAX_EXCEPTION_SHARE, MAX_K, MIN_K

_SHIPPED = files("rkf.cluster") / "recipes"
_GRID_MAX_K = 255
_AFFINE = ("none", "tensor", "row", "group")


def _check(holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{expected}; got {got}")


@dataclass(frozen=True, slots=True)
class Rule:
    """How one tensor is stored. k None: dense. rows_per_table None: one table for the whole matrix."""

    k: int | None = None
    grid: bool = False
    affine: str = "none"
    group: int | None = None
    affine_dtype: str = "f16"
    exceptions: float = 0.0
    rows_per_table: int | None = None

    def __post_init__(self) -> None:
        _check(self.k is None or MIN_K <= self.k <= MAX_K, f"k is {MIN_K} to {MAX_K}", self.k)
        _check(
            not self.grid or self.k is None or self.k <= _GRID_MAX_K, f"k on the grid is at most {_GRID_MAX_K}", self.k
        )
        _check(self.affine in _AFFINE, f"affine is one of {', '.join(_AFFINE)}", self.affine)
        _check(
            not self.grid or self.affine != "none",
            'grid needs a factor: affine = "tensor", "row" or "group"',
            self.affine,
        )
        _check(self.grid or self.affine != "tensor", 'affine = "tensor" serves only with grid = true', self.affine)
        _check((self.group is not None) == (self.affine == "group"), 'group goes with affine = "group"', self.group)
        _check(self.group is None or self.group in GROUP_SIZES, f"group is one of {GROUP_SIZES}", self.group)
        _check(self.affine_dtype in ("f16", "f32"), "affine_dtype is f16 or f32", self.affine_dtype)
        _check(
            0 <= self.exceptions <= 1 / MAX_EXCEPTION_SHARE,
            f"exceptions are a share, 0 to 1/{MAX_EXCEPTION_SHARE}",
            self.exceptions,
        )
        _check(self.rows_per_table is None or self.rows_per_table > 0, "rows_per_table is above 0", self.rows_per_table)


DENSE = Rule()


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named list of (patterns, rule). `text` and `k` together say all: they belong in the provenance."""

    name: str
    k: int | None
    text: str
    rules: tuple[tuple[tuple[str, ...], Rule], ...]

    @classmethod
    def load(cls, name_or_path: str | Path = "default", k: int | None = None) -> Recipe:
        """A shipped recipe by name, or a TOML file by path; `k` replaces its base K. Raises UsageError."""
        name = str(name_or_path)
        shipped = _SHIPPED / f"{name}.toml"
        if name in shipped_names():
            return cls.parse(shipped.read_text("utf-8"), name, k)
        path = Path(name_or_path)
        if not path.is_file():
            raise UsageError(f"{name}: no such recipe; give a TOML file or one of {', '.join(shipped_names())}")
        return cls.parse(path.read_text("utf-8"), name, k)

    @classmethod
    def parse(cls, text: str, name: str, k: int | None = None) -> Recipe:
        """A recipe from TOML text; `name` stands in messages. Raises UsageError."""
        try:
            data = tomllib.loads(text)
            unknown = data.keys() - {"description", "k", "rule"}
            _check(not unknown, "a recipe has description, k and rules", ", ".join(sorted(unknown)))
            base = k if k is not None else data.get("k")
            rules = tuple(_rule(entry, base) for entry in data.get("rule", []))
        except (tomllib.TOMLDecodeError, TypeError, ValueError) as error:
            raise UsageError(f"recipe {name}: {error}") from error
        return cls(name, base, text, rules)

    def rule(self, name: str, shape: tuple[int, ...]) -> Rule:
        """How the tensor of this name and shape is stored."""
        if len(shape) < 2:
            return DENSE
        return next(
            (rule for patterns, rule in self.rules if any(fnmatchcase(name, pattern) for pattern in patterns)), DENSE
        )


def shipped_names() -> list[str]:
    """The names that `Recipe.load` knows without a file."""
    return sorted(entry.name.removesuffix(".toml") for entry in _SHIPPED.iterdir() if entry.name.endswith(".toml"))


def _rule(entry: Mapping[str, Any], base: int | None) -> tuple[tuple[str, ...], Rule]:
    options = dict(entry)
    patterns = tuple(options.pop("tensors", ()))
    _check(bool(patterns), "a rule names tensors", entry)
    if options.pop("dense", False):
        _check(not options, "a dense rule has no other options", ", ".join(options))
        return patterns, DENSE
    factor = options.pop("k_factor", 1)
    if "k" not in options:
        _check(base is not None, "a rule needs k, or the recipe a base k", entry)
        options["k"] = min(base * factor, _GRID_MAX_K if options.get("grid") else MAX_K)
    return patterns, Rule(**options)
