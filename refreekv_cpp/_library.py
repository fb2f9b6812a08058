"""Makes `llama_cpp` load the library that this package brings, and no other.

Import this before anything imports `llama_cpp` (`import refreekv_cpp` does).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

# what llama_cpp reads to find its libraries, at import
_VARIABLES = ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")


def library_dir() -> Path:
    """The folder with libllama, libmtmd and ggml, as installed with this package."""
    with resources.as_file(resources.files("refreekv_cpp") / "lib") as path:
        return path


@contextlib.contextmanager
def _environment(folder: Path) -> Iterator[None]:
    saved = {name: os.environ.get(name) for name in _VARIABLES}
    os.environ.update(dict.fromkeys(_VARIABLES, str(folder)))
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def import_llama_cpp() -> ctypes.CDLL:
    """Import `llama_cpp` on our library.

    Raises:
        ImportError: `llama_cpp` was imported before, on a library of its own.
    """
    if "llama_cpp" not in sys.modules:
        folder = library_dir()
        if not folder.is_dir():
            raise ImportError(f"refreekv_cpp is installed without its native library ({folder} is missing)")
        with _environment(folder):
            import llama_cpp.mtmd_cpp

    import llama_cpp.llama_cpp

    library: ctypes.CDLL = llama_cpp.llama_cpp._lib
    if not hasattr(library, "refreekv_abi_version"):
        raise ImportError(
            f"llama_cpp has already loaded a library without refreekv ({library._name}): "
            "import refreekv_cpp before llama_cpp, or before whatever imports it"
        )
    return library
