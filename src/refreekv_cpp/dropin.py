"""The drop-in: programs that construct `llama_cpp.Llama` themselves get `refreekv_cpp.Llama`.

The environment variable REFREEKV_POLICY asks for it when `refreekv_cpp` is imported, and names the policy. Since such
programs know nothing of this package, two things that are errors otherwise are none in a process with the drop-in:
an unknown option of `Llama` is ignored, as upstream does (but not one that starts with kv_, which can only be meant for
us); and a model that cannot have the policy runs with "full", after a warning.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import llama_cpp

from refreekv_cpp.llama import Llama
from refreekv_cpp.options import KVOptions


def install() -> None:
    """From now on `llama_cpp.Llama` is `refreekv_cpp.Llama`, a class derived from the original.

    Only for what looks it up later: a module that has imported the original keeps it.
    """
    Llama.ignore_unknown_options = True
    _replace(Llama)


@contextmanager
def replaced_by(kind: type[Llama]) -> Iterator[None]:
    """Inside, `llama_cpp.Llama` is this class."""
    before = llama_cpp.Llama
    _replace(kind)
    try:
        yield
    finally:
        _replace(before)


def _replace(kind: type[llama_cpp.Llama]) -> None:
    llama_cpp.Llama = llama_cpp.llama.Llama = kind  # type: ignore[misc]


def install_if_asked() -> None:
    """Do so where REFREEKV_POLICY is set, but not for the commands, which have an option for the policy.

    Raises:
        PolicyError: it, REFREEKV_EVICTED or REFREEKV_MEMORY_LIMIT is not valid.
    """
    if sys.orig_argv[1:3] == ["-m", "refreekv_cpp"]:
        return
    if KVOptions.of().from_environment:
        install()
