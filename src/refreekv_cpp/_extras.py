"""What only a part of the package needs is in an extra (pyproject.toml), and is imported where it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from refreekv_cpp.errors import RefreeKVError


class MissingExtraError(RefreeKVError, ImportError):
    """Something needs a package that is not installed. The message names the command that installs it."""


@contextmanager
def needs_extra(extra: Literal["lab", "pdf", "server"], what: str) -> Iterator[None]:
    """Around imports of modules that this extra brings; `what` needs them.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "refreekv_cpp":
            raise  # a broken install, and nothing that an extra brings
        raise MissingExtraError(
            f'{what} needs {error.name}, which is not installed: run `pip install "refreekv-cpp[{extra}]"`'
        ) from error
