"""The folder for files that rkf can recreate: fetched checkpoints, the default model, calibrations, kernels."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path

from rkf.errors import OutputError


def cache_dir() -> Path:
    """The cache folder, which may not exist yet: `RKF_CACHE` if set, otherwise the platform's cache folder.

    Raises OutputError for a user without a home folder.
    """
    if chosen := os.environ.get("RKF_CACHE"):
        return Path(chosen)
    try:
        found = user_cache_path("rkf")
    except RuntimeError:  # pathlib found no home folder
        found = Path("~")
    if not found.is_absolute():
        raise OutputError("there is no home folder for a cache: set RKF_CACHE to a folder")
    return found
