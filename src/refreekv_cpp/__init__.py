"""llama-cpp-python with a smaller KV cache.

The package brings a private copy of llama-cpp-python, which is the module `llama_cpp` from this import on. With the
environment variable REFREEKV_POLICY set, `llama_cpp.Llama` is `refreekv_cpp.Llama`, too (`refreekv_cpp.dropin`).
"""

from __future__ import annotations

import importlib.metadata

from refreekv_cpp import _llama_cpp  # noqa: F401  (makes `llama_cpp` importable for what follows)
from refreekv_cpp.dropin import install_if_asked
from refreekv_cpp.errors import (
    CacheMemoryError,
    CacheStateError,
    ClosedError,
    ComputeError,
    ContextError,
    ContextFullError,
    PolicyError,
    RefreeKVError,
    TokenError,
    UnsupportedModelError,
)
from refreekv_cpp.llama import Llama
from refreekv_cpp.policies import H2O, Full, Policy, PyramidKV, PythonPolicy, ReFreeKV, SnapKV, Streaming, TopP
from refreekv_cpp.stats import KVStats, ProcessMemory

__all__ = [
    "H2O",
    "CacheMemoryError",
    "CacheStateError",
    "ClosedError",
    "ComputeError",
    "ContextError",
    "ContextFullError",
    "Full",
    "KVStats",
    "Llama",
    "Policy",
    "PolicyError",
    "ProcessMemory",
    "PyramidKV",
    "PythonPolicy",
    "ReFreeKV",
    "RefreeKVError",
    "SnapKV",
    "Streaming",
    "TokenError",
    "TopP",
    "UnsupportedModelError",
]

try:
    __version__ = importlib.metadata.version("refreekv-cpp")
except importlib.metadata.PackageNotFoundError:  # run from its sources
    __version__ = "0+unknown"

install_if_asked()
del install_if_asked, importlib
