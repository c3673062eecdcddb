"""The folder for files that rkf can recreate: fetched checkpoints, the default model, calibrations, kernels."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_dir() -> Path:
    """The cache folder, which may not exist yet: `RKF_CACHE` if set, otherwise the platform's cache folder."""
    chosen = os.environ.get("RKF_CACHE")
    return Path(chosen) if chosen else user_cache_path("rkf")
