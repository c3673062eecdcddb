"""rkf: a language model as ranks (bit-packed indices) plus values (a short ascending list a matrix).

`rkf.open` reads a file, `rkf.convert` makes one, `rkf.load` runs one. Importing this package costs numpy only:
numba is imported by `rkf.load` and `rkf.convert`, torch by `rkf.torch`.
"""

from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

from rkf._version import __version__

# In a checkout `runtime/` and `converters/` stand beside `rkf/`; an installed wheel has them inside it.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "runtime" / "__init__.py").is_file():
    __path__.append(str(_root))

if TYPE_CHECKING:
    from rkf.converters.pipeline import convert as convert
    from rkf.file.container import open_file as open
    from rkf.runtime.model import load as load

__all__ = ["__version__", "convert", "load", "open"]

_LAZY = {
    "open": ("rkf.file.container", "open_file"),
    "convert": ("rkf.converters.pipeline", "convert"),
    "load": ("rkf.runtime.model", "load"),
}


def __getattr__(name: str) -> Any:
    """Import a public function when it is first used, so that `rkf info` never pays for numba."""
    if name not in _LAZY:
        raise AttributeError(f"module 'rkf' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)
