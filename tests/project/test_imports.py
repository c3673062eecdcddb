"""Imports point one way (docs/architecture.md), and only the CLI reaches everything."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {"rkf": ROOT / "rkf", "rkf.runtime": ROOT / "runtime", "rkf.converters": ROOT / "converters"}

# Layer -> the layers it may import. MEMBERS: the layer of a module and of all below it; any other is "container".
MAY = {
    "base": {"base"},
    "matrix": {"base", "matrix"},
    "container": {"base", "matrix", "container"},
    "cluster": {"base", "matrix", "container", "cluster"},
    "converters": {"base", "matrix", "container", "cluster", "converters"},
    "torch": {"base", "matrix", "container", "torch"},
    "runtime": {"base", "matrix", "container", "torch", "runtime"},
    "eval": {"base", "matrix", "container", "torch", "runtime", "eval"},
}
MEMBERS = {
    **dict.fromkeys(("rkf._version", "rkf.errors", "rkf.format", "rkf.cache", "rkf.fields"), "base"),
    **dict.fromkeys(("rkf.matrix", "rkf.bitpack", "rkf.config"), "matrix"),
    "rkf.cluster": "cluster",
    "rkf.converters": "converters",
    "rkf.runtime": "runtime",
    "rkf.torch": "torch",
    **dict.fromkeys(("rkf.calibration", "rkf.eval", "rkf.study", "rkf.tune"), "eval"),
    **dict.fromkeys(("rkf.cli", "rkf.__main__", "rkf.commands"), "cli"),
}
HEAVY = {"numba", "torch", "llvmlite", "transformers", "matplotlib", "safetensors", "gguf", "huggingface_hub", "tqdm"}


@cache
def modules():
    """Name -> file of every module."""
    found = {}
    for room, folder in ROOMS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([room, *(part for part in parts if part != "__init__")])] = path
    return found


def layer(module):
    if module == "rkf":
        return "base"
    found = [name for name in MEMBERS if f"{module}.".startswith(f"{name}.")]
    return MEMBERS[max(found, key=len)] if found else "container"


def imports(module):
    """(module, at import time?) for each import; those for type checkers alone are left out."""
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
    """All nodes below those that are chosen."""
    return {child for node in ast.walk(tree) if chosen(node) for child in ast.walk(node)}


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module):
    own = layer(module)
    reached = {name for name, _ in imports(module) if name.partition(".")[0] == "rkf"}
    assert own == "cli" or not {name for name in reached if layer(name) not in MAY[own]}


@pytest.mark.parametrize("module", [n for n in modules() if layer(n) in ("base", "matrix", "container", "cli")])
def test_what_info_needs_imports_nothing_heavy(module):
    assert not {name.partition(".")[0] for name, at_import in imports(module) if at_import} & HEAVY
