"""Studies of ranks and values: experiments that change a model's centroids on purpose. Needs matplotlib."""

from __future__ import annotations

from rkf.errors import UsageError

try:
    import matplotlib as _matplotlib
except ModuleNotFoundError as error:
    raise UsageError("this needs matplotlib, which is not installed: pip install 'rkf-llm[study]'") from error

from rkf.study.running import STUDIES, study
from rkf.study.sweep import sweep

__all__ = ["STUDIES", "study", "sweep"]

del _matplotlib
