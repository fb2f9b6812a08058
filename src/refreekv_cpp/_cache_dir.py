"""The one folder of files that can be had again: models and the cold store's files."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

VARIABLE = "REFREEKV_CACHE_DIR"


def cache_dir() -> Path:
    """What the environment variable REFREEKV_CACHE_DIR says, else `refreekv-cpp` in the user's cache folder.

    The folder need not exist yet.
    """
    folder = os.environ.get(VARIABLE)
    return Path(folder).expanduser() if folder else platformdirs.user_cache_path("refreekv-cpp")
