"""Imports point one way (docs/architecture.md), only the CLI reaches everything, and no name is used twice."""

import ast
from collections import Counter
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"rkf": ROOT / "rkf", "rkf.runtime": ROOT / "runtime", "rkf.converters": ROOT / "converters"}

# Room -> the other rooms it may import. Only the commands reach everything.
FILE = {"base", "model", "format", "file"}
MAY = {
    "base": set(),
    "format": {"base"},
    "model": {"base", "format"},
    "file": {"base", "model", "format"},
    "numbers": FILE,
    "text": FILE,
    "cluster": FILE | {"numbers"},
    "converters": FILE | {"numbers", "text", "cluster"},
    "calibrate": FILE | {"numbers", "text", "torch", "runtime"},
    "torch": FILE,
    "runtime": FILE | {"text", "torch", "converters"},
    "eval": FILE | {"text", "runtime"},
    "serve": FILE | {"text", "runtime"},
    "tune": FILE | {"text", "calibrate", "torch", "runtime"},
    "study": FILE | {"text", "calibrate", "runtime", "eval"},
    "bridges": FILE | {"numbers", "torch", "converters", "runtime", "eval"},
}
BASE = {"rkf", "rkf._version", "rkf.errors", "rkf.cache", "rkf.worker_threads"}
COMMANDS = {"rkf.cli", "rkf.__main__"}
HEAVY = {
    "numba",
    "torch",
    "llvmlite",
    "transformers",
    "matplotlib",
    "safetensors",
    "gguf",
    "huggingface_hub",
    "tqdm",
    "starlette",
}


@cache
def modules():
    """Name -> file of every module."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def room(module):
    """rkf.format.matrix -> format"""
    return "base" if module in BASE else "commands" if module in COMMANDS else module.split(".")[1]


def imports(module):
    """(module, at import time?) for each import, without those for type checkers only."""
    tree = ast.parse(modules()[module].read_text("utf-8"))
    for_checkers = inside(tree, lambda n: isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    in_functions = inside(tree, lambda n: isinstance(n, ast.FunctionDef))
    for node in ast.walk(tree):
        if node in for_checkers:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in in_functions) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                yield name if name in modules() else node.module, node not in in_functions


def inside(tree, chosen):
    """All nodes below the chosen ones."""
    return {child for node in ast.walk(tree) if chosen(node) for child in ast.walk(node)}


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module):
    own = room(module)
    reached = {room(name) for name, _ in imports(module) if name.partition(".")[0] == "rkf"}
    assert own == "commands" or not reached - MAY[own] - {own}


def test_the_ways_are_no_circle():
    TopologicalSorter(MAY).prepare()


@pytest.mark.parametrize("module", [n for n in modules() if room(n) in ("base", "model", "format", "file", "commands")])
def test_what_info_needs_imports_nothing_heavy(module):
    assert not {name.partition(".")[0] for name, at_import in imports(module) if at_import} & HEAVY


def test_no_two_modules_share_a_name():
    assert not repeated(path.stem for path in modules().values() if path.stem != "__init__")


def test_no_two_public_classes_share_a_name():
    trees = [ast.parse(path.read_text("utf-8")) for path in modules().values()]
    classes = [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert not repeated(name for name in classes if not name.startswith("_"))


def repeated(names):
    return [name for name, count in Counter(names).items() if count > 1]
