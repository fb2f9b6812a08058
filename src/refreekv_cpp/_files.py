"""Files that a user names."""

from __future__ import annotations

import os


def check_file(path: str | os.PathLike[str]) -> str:
    """The path of a file that is there.

    Raises:
        FileNotFoundError: there is none, or it is a folder.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: {'a folder, not a file' if os.path.isdir(path) else 'no such file'}")
    return path
