"""What stands in the place of a model and a context that have been freed, or belong to a process that was forked."""

from __future__ import annotations

import os
import weakref
from typing import Any, NoReturn

from refreekv_cpp.errors import ClosedError


class Closed:
    """A wrapper of llama-cpp-python's (model, context or batch) whose native part is gone: asking it raises."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return super().__getattribute__(name)
        return raise_closed()


class Forked(Closed):
    """One that another process made."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        raise ClosedError(
            "this Llama was made before os.fork(), and only the parent process can use it; make a new one"
        )


def raise_closed() -> NoReturn:
    raise ClosedError("this Llama is closed, or could not be loaded; make a new one")


def mark_closed(wrapper: Any, stand_in: type[Closed] = Closed) -> None:
    """From now on everything that holds this wrapper (tokenizers do) gets a ClosedError, not freed memory."""
    wrapper.__class__ = stand_in


_llamas: weakref.WeakSet[Any] = weakref.WeakSet()


def before_fork(llama: Any) -> None:
    """Have `llama._forked` called in every child process that is forked from now on."""
    _llamas.add(llama)


def _after_fork() -> None:
    for llama in list(_llamas):
        llama._forked()
    _llamas.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
