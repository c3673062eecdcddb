"""Recipes: how each tensor is clustered. A recipe is data (TOML): ordered rules over the names, roles and layers of a
program's tensors. Knows no weights.

    description = "one line"
    k = 16                                  # the base K; `--k` replaces it

    [defaults]                              # options of every rule that does not override them
    exceptions = 0.001

    [rotated]                               # options in place of the defaults for tensors with rotated rows; with this
    affine = "row"                          # table, a calibrated conversion rotates the program (rkf.model.rotation)

    [[rule]]                                # the first rule that fits decides; it has at least one of these three:
    roles = ["query", "key"]                # the tensor's role in its model (rkf.model.roles)
    layers = "last"                         # "first", "last", or "ends" for both
    tensors = ["model.layers.{last}.*"]     # shell patterns over canonical names; {last} is the last layer's number
    k_factor = 2                            # K = 2 x the base, but not raised beyond 128
    k_min = 32                              # and at least 32; or `k = 64` for any base, or `dense = true`
    grid = true                             # centroids are integers in -127..127 (K is then 255 at most)
    affine = "tensor"                       # "none", "tensor" (only with grid), "row", "group"
    group = 64                              # columns that share a factor, with affine = "group"
    affine_dtype = "f16"                    # of row and group factors; or "f32"
    exceptions = 0.002                      # the share of weights that stay exact
    exact_rows = 64                         # and rows of embedding and output head: the text's most frequent tokens
    bits = 4.5                              # with grid: even steps, as wide as gives the ranks this entropy
    rows_per_table = 1536                   # rows that share a list of centroids; all of them by default

A stack of experts has a list of centroids for each expert. A tensor that no rule fits stays dense, and so do vectors,
routers and kernels of convolutions.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any

from rkf.errors import UsageError
from rkf.format.constants import GROUP_SIZES, MAX_EXCEPTION_SHARE, MAX_K, MIN_K
from rkf.model.program import Program, layer_of
from rkf.model.roles import KEPT_DENSE, ROLES, roles
from rkf.model.rotation import rotations

_SHIPPED = files("rkf.cluster") / "recipes"
_GRID_MAX_K = 255
_RAISED_K = 128  # beyond it an integer grid gains little: 255 even steps have 0.7 times the error, for one more bit
_LEAST_ROWS = 16  # for each exact row: MAX_EXCEPTION_SHARE allows one in 8, other exceptions included
_AFFINE = ("none", "tensor", "row", "group")


_MOST_BYTES = 1 << 20  # of a recipe, which is copied into the file's provenance
_MOST_PATTERNS = 1000  # with wildcards: each is tried on every tensor
# The keys of a rule, besides those that choose tensors.
_TYPES: dict[str, type] = {
    **{"k": int, "k_factor": int, "k_min": int, "dense": bool, "grid": bool, "bits": float, "exceptions": float},
    **{"affine": str, "affine_dtype": str, "group": int, "exact_rows": int, "rows_per_table": int},
}


def _check(holds: object, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{expected}; got {got}")


@dataclass(frozen=True, slots=True)
class Rule:
    """How to store one tensor. k None: dense. rows_per_table None: one table for the whole matrix."""

    k: int | None = None
    grid: bool = False
    affine: str = "none"
    group: int | None = None
    affine_dtype: str = "f16"
    exceptions: float = 0.0
    exact_rows: int = 0
    rows_per_table: int | None = None
    bits: float | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.k, int) and isinstance(self.rows_per_table or 1, int)
        _check(self.k is None or whole, "k and rows_per_table are whole numbers", (self.k, self.rows_per_table))
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
        _check(isinstance(self.exact_rows, int) and self.exact_rows >= 0, "exact_rows is 0 or more", self.exact_rows)
        most = 1 / MAX_EXCEPTION_SHARE - (1 / _LEAST_ROWS if self.exact_rows else 0)
        _check(
            0 <= self.exceptions <= most,
            f"exceptions are a share, 0 to {most:g}" + (" beside exact_rows" if self.exact_rows else ""),
            self.exceptions,
        )
        _check(self.bits is None or (self.grid and 0 < self.bits <= 7), "bits go with grid, and are 0 to 7", self.bits)
        _check(self.rows_per_table is None or self.rows_per_table > 0, "rows_per_table is above 0", self.rows_per_table)

    def rows_kept(self, rows: int) -> int:
        """The number of an output head's rows that stay exact."""
        return min(self.exact_rows, rows // _LEAST_ROWS)


DENSE = Rule()


@dataclass(frozen=True, slots=True)
class _Choice:
    """The tensors of a rule: those that fit all conditions that are not None. A tensor is one of `names` or fits one of
    `patterns`. layers: numbers.
    """

    names: frozenset[str]
    patterns: tuple[str, ...] | None
    roles: frozenset[str] | None
    layers: frozenset[int] | None

    def fits(self, name: str, role: str) -> bool:
        return (
            (self.patterns is None or name in self.names or any(fnmatchcase(name, each) for each in self.patterns))
            and (self.roles is None or role in self.roles)
            and (self.layers is None or layer_of(name) in self.layers)
        )


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named list of rules for one program. `text` and `k` together define it and belong in the provenance.

    rules: what they choose, and how to store plain and rotated tensors. roles: those of the program's tensors, by name;
    a table that is also the output head is a "head".
    rotated: the tensors with transformed rows. rotates: whether it has options for such tensors.
    """

    name: str
    k: int | None
    text: str
    rules: tuple[tuple[_Choice, Rule, Rule], ...]
    roles: Mapping[str, str]
    rotated: Collection[str] = ()
    rotates: bool = False

    @classmethod
    def load(cls, name_or_path: str | Path, program: Program, k: int | None = None, head: str | None = None) -> Recipe:
        """A built-in recipe by name, or a TOML file by path; `k` replaces its base K. Raises UsageError.

        head: the name under which the output head is stored, if it is another than the program's: the embedding's, if
        the head is tied.
        """
        name = str(name_or_path)
        if name in shipped_names():
            return cls.parse((_SHIPPED / f"{name}.toml").read_text("utf-8"), name, program, k, head)
        path = Path(name_or_path)
        if not path.is_file():
            raise UsageError(f"{name}: no such recipe; give a TOML file or one of {', '.join(shipped_names())}")
        try:
            with path.open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
            text = data.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"recipe {name}: {error}") from error
        if len(data) > _MOST_BYTES:
            raise UsageError(f"recipe {name}: expected at most {_MOST_BYTES} bytes")
        return cls.parse(text, name, program, k, head)

    @classmethod
    def parse(cls, text: str, name: str, program: Program, k: int | None = None, head: str | None = None) -> Recipe:
        """A recipe from TOML text; `name` is for messages, `head` as for `load`. Raises UsageError."""
        try:
            data = tomllib.loads(text)
            unknown = data.keys() - {"description", "k", "defaults", "rotated", "rule"}
            _check(not unknown, "a recipe has description, k, defaults, rotated and rules", ", ".join(sorted(unknown)))
            if "k" in data:
                _check_type("k", data["k"], int)
                _check(MIN_K <= data["k"] <= MAX_K, f"k is {MIN_K} to {MAX_K}", data["k"])
            base = k if k is not None else data.get("k")
            plain = data.get("defaults", {})
            turned = {**plain, **data.get("rotated", {})}
            last = program.layers - 1
            rules = tuple(
                (_choice(entry, last), _rule(plain, entry, base), _rule(turned, entry, base))
                for entry in data.get("rule", [])
            )
            count = sum(len(choice.patterns or ()) for choice, *_ in rules)
            _check(count <= _MOST_PATTERNS, f"a recipe has at most {_MOST_PATTERNS} patterns besides names", count)
        # ValueError: from TOML itself, or from a check here
        except (AttributeError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise UsageError(f"recipe {name}: {error}") from error
        found = {**roles(program), head or program.logits.weight: "head"}
        return cls(name, base, text, rules, found, rotations(program).keys(), "rotated" in data)

    def rule(self, name: str, shape: tuple[int, ...]) -> Rule:
        """How to store the tensor of this name and shape."""
        role = self.roles.get(name)
        if role is None or role in KEPT_DENSE:
            return DENSE
        plain, turned = next((rules for choice, *rules in self.rules if choice.fits(name, role)), (DENSE, DENSE))
        rule = turned if name in self.rotated else plain
        return replace(rule, rows_per_table=shape[-2]) if rule.k is not None and len(shape) > 2 else rule


def shipped_names() -> list[str]:
    """The built-in names, which `Recipe.load` knows without a file."""
    return sorted(entry.name.removesuffix(".toml") for entry in _SHIPPED.iterdir() if entry.name.endswith(".toml"))


def _choice(entry: Mapping[str, Any], last: int) -> _Choice:
    """last: the number of the last layer."""
    given = [key for key in ("tensors", "roles", "layers") if key in entry]
    _check(given, "a rule has tensors, roles or layers", dict(entry))
    for key in ("tensors", "roles"):
        texts = isinstance(entry.get(key), list) and entry[key] and all(isinstance(each, str) for each in entry[key])
        _check(key not in entry or texts, f"{key} are a list of texts", dict(entry))
    unknown = set(entry.get("roles", ())) - set(ROLES)
    _check(not unknown, f"roles are among {', '.join(ROLES)}", ", ".join(map(str, sorted(unknown))))
    ends = {"first": {0}, "last": {last}, "ends": {0, last}}
    _check("layers" not in entry or entry["layers"] in ends, f"layers is one of {', '.join(ends)}", entry.get("layers"))
    tensors = [pattern.replace("{last}", str(last)) for pattern in entry.get("tensors", ())]
    patterns = tuple(each for each in tensors if set(each) & set("*?["))
    return _Choice(
        frozenset(tensors),
        patterns if "tensors" in entry else None,
        frozenset(entry["roles"]) if "roles" in entry else None,
        frozenset(ends[entry["layers"]]) if "layers" in entry else None,
    )


def _check_type(key: str, value: object, kind: type | None) -> None:
    """A number may be written whole where it need not be; true and false are no numbers."""
    _check(kind is not None, f"a rule has tensors, roles, layers, {', '.join(_TYPES)}", key)
    fits = isinstance(value, int | float) and isfinite(value) if kind is float else isinstance(value, kind or object)
    _check(
        fits and isinstance(value, bool) == (kind is bool), f"{key} is of type {kind and kind.__name__}", repr(value)
    )


def _rule(defaults: Mapping[str, Any], entry: Mapping[str, Any], base: int | None) -> Rule:
    own = {key: value for key, value in entry.items() if key not in ("tensors", "roles", "layers")}
    for key, value in (*defaults.items(), *own.items()):
        _check_type(key, value, _TYPES.get(key))
    if own.pop("dense", False):
        _check(not own, "a dense rule has no other options", ", ".join(own))
        return DENSE
    options = {**defaults, **own}
    factor, least = options.pop("k_factor", 1), options.pop("k_min", 0)
    if "k" not in options:
        _check(base is not None, "a rule needs k, or the recipe a base k", dict(entry))
        raised = max(base, min(base * factor, _RAISED_K), least)
        options["k"] = min(raised, _GRID_MAX_K) if options.get("grid") else raised
    return Rule(**options)
