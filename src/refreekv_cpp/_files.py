"""Files and folders that a user names, or that hold what a user has said."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import socket
import stat
from pathlib import Path

import psutil

_TEMPORARY_NAME = re.compile(r"\.(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]+)-[0-9a-f]{8}\.tmp")


def check_file(path: str | os.PathLike[str]) -> str:
    """The path of a file that is there.

    Raises:
        FileNotFoundError: there is none, or it is a folder, a pipe or a device.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        there = "a pipe or a device, not a file" if os.path.exists(path) else "no such file"
        raise FileNotFoundError(f"{path}: {'a folder, not a file' if os.path.isdir(path) else there}")
    return path


def why_not_private(folder: Path) -> str | None:
    """Why somebody else could put files into a folder that is there; None: nobody can but its group and the system.

    Whoever can has the cache of a model go on from what they have made up. Windows is not asked.
    """
    if not hasattr(os, "geteuid"):
        return None
    try:
        kinds = [folder.lstat(), folder.stat()]  # of a link to a folder, too
    except OSError:
        return None  # it is not there
    if os.geteuid() != 0 and any(kind.st_uid not in (0, os.geteuid()) for kind in kinds):
        return "it belongs to another user"
    if kinds[-1].st_mode & stat.S_IWOTH:
        return "every user can write to it"
    return None


def write_file(path: Path, text: str) -> None:
    """Replace a file by one with this text, for its owner alone: whoever reads it has the one or the other, also after
    a power cut. The folder is made, for its owner alone.

    Raises:
        OSError: it cannot be written. What was there stays.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{_this_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_left_behind(folder: Path) -> None:
    """Remove what `write_file` has left in processes of this machine that were killed."""
    for path in folder.glob(".*.tmp"):
        name = _TEMPORARY_NAME.fullmatch(path.name)
        if name is not None and name["host"] == _this_host():
            with contextlib.suppress(OSError, OverflowError):
                if not psutil.pid_exists(int(name["pid"])):
                    path.unlink()


def _this_host() -> str:
    return hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()
