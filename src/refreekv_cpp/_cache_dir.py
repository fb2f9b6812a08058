"""The one folder of files that can be had again: models and the cold store's files."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from refreekv_cpp.errors import PolicyError

VARIABLE = "REFREEKV_CACHE_DIR"


def cache_dir() -> Path:
    """What the environment variable REFREEKV_CACHE_DIR says, else `refreekv-cpp` in the user's cache folder.

    The folder need not exist yet.

    Raises:
        PolicyError: the variable begins with ~ and the name of a user who is not there.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        return platformdirs.user_cache_path("refreekv-cpp")
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise PolicyError(f"{VARIABLE}={folder}: must be a folder; there is no such user") from None
