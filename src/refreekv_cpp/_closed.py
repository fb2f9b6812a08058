"""What stands in the place of a model and a context that have been freed, or belong to a process that was forked."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

from refreekv_cpp._llama_cpp import library_dir
from refreekv_cpp.errors import ClosedError

_OMP_PAUSE_HARD = 2  # omp.h


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


# Held while a Llama is loaded. llama-cpp-python sends stdout and stderr to nowhere meanwhile, and a process that is
# forked then would never get them back.
loading = threading.RLock()

_llamas: weakref.WeakSet[Any] = weakref.WeakSet()


def before_fork(llama: Any) -> None:
    """Have `llama._forked` called in every child process that is forked from now on."""
    _llamas.add(llama)


@functools.cache
def _omp_pause() -> Callable[[int], int] | None:
    """OpenMP's omp_pause_resource_all; None: ggml was built without OpenMP."""
    for path in library_dir().glob("*ggml-cpu*"):
        try:
            pause: Callable[[int], int] = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD).omp_pause_resource_all
        except (OSError, AttributeError):  # it is not in use, or needs no OpenMP
            continue
        return pause
    return None


def _before() -> None:
    loading.acquire()
    # end the threads that OpenMP keeps for this one: the child does not have them, and would wait for them for ever
    if (pause := _omp_pause()) is not None:
        pause(_OMP_PAUSE_HARD)


def _in_child() -> None:
    loading.release()
    for llama in list(_llamas):
        llama._forked()
    _llamas.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_before, after_in_parent=loading.release, after_in_child=_in_child)
