"""The private copy of llama-cpp-python, which the build puts beside this file, and the native libraries it loads.

The copy becomes the module `llama_cpp` in every process that imports `refreekv_cpp` first, and in every process whose
environment has no other llama-cpp-python (cmake/refreekv_llama_cpp.py). Another one that is installed stays as it is:
it keeps its own library, and works in every process that does not import this package.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# The name of a build of ggml's CPU backend, such as "haswell", that is to be used in place of the best one for this
# processor. Only a portable build has several of them (docs/how-to/install.md).
CPU_VARIABLE = "REFREEKV_CPU"

# llama_cpp reads these when it is imported; they would lead it to another library than ours
_LIBRARY_VARIABLES = ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")


def _folder(name: str) -> Path:
    """A folder that the build has put into this package.

    An editable install keeps it apart from the sources, so the package can have more than one folder.
    """
    import refreekv_cpp

    for parent in refreekv_cpp.__path__:
        if (folder := Path(parent) / name).is_dir():
            return folder
    raise ImportError(
        f"refreekv_cpp is not installed completely: {Path(refreekv_cpp.__path__[0]) / name} is missing. "
        "Run `pip install .` in the clone, and start Python in another folder than src/"
    )


def library_dir() -> Path:
    """The folder with libllama, libmtmd and ggml."""
    return _folder("lib")


def python_dir() -> Path:
    """The folder that has `llama_cpp`, the pinned llama-cpp-python without its native part."""
    return _folder("upstream")


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """ggml says which backends it loads, through llama-cpp-python's logger; an import prints nothing."""
    logger = logging.getLogger("llama-cpp-python")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _libraries_in(folder: Path) -> Iterator[None]:
    saved = {name: os.environ.get(name) for name in _LIBRARY_VARIABLES}
    os.environ.update(dict.fromkeys(_LIBRARY_VARIABLES, str(folder)))
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _import_private_copy() -> None:
    package = python_dir() / "llama_cpp"
    spec = importlib.util.spec_from_file_location(
        "llama_cpp", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["llama_cpp"] = module
    try:
        with _libraries_in(library_dir()):
            spec.loader.exec_module(module)
            importlib.import_module("llama_cpp.mtmd_cpp")
        with _errors_only():
            _load_backends(library_dir())
    except BaseException:
        for name in [name for name in sys.modules if name == "llama_cpp" or name.startswith("llama_cpp.")]:
            del sys.modules[name]
        raise


def cpu_variants() -> dict[str, Path]:
    """The builds of ggml's CPU backend in this package, by name; empty where there is a single one without a name."""
    return {file.stem.partition("ggml-cpu-")[2]: file for file in sorted(library_dir().glob("*ggml-cpu-*"))}


def _load_backends(folder: Path) -> None:
    """Load ggml's backends where they are modules (GGML_BACKEND_DL), which ggml would seek beside the Python program.

    Raises:
        ImportError: the environment asks for a CPU backend that is not here, or that this processor cannot run.
    """
    chosen = os.environ.get(CPU_VARIABLE)
    variants = cpu_variants()
    ggml = ctypes.CDLL(str(next(file for file in folder.iterdir() if file.stem in ("libggml", "ggml"))))
    if not chosen:
        ggml.ggml_backend_reg_count.restype = ctypes.c_size_t
        if ggml.ggml_backend_reg_count() == 0:
            ggml.ggml_backend_load_all_from_path(os.fsencode(folder))
        return
    if not variants:
        raise ImportError(f"{CPU_VARIABLE}={chosen}: this build is for one kind of processor, and has no choice")
    if chosen not in variants:
        raise ImportError(f"{CPU_VARIABLE}={chosen}: must be one of {', '.join(variants)}")
    ggml.ggml_backend_load.restype = ctypes.c_void_p
    if not ggml.ggml_backend_load(os.fsencode(variants[chosen])):
        raise ImportError(f"{CPU_VARIABLE}={chosen}: this processor lacks instructions that it needs")
    for file in folder.glob("*ggml-*"):
        if not file.name.startswith(("libggml-base", "ggml-base", "libggml-cpu-", "ggml-cpu-")):
            ggml.ggml_backend_load(os.fsencode(file))


def _load() -> ctypes.CDLL:
    """Make the private copy `llama_cpp`, unless it is already, and return its libllama.

    Raises:
        ImportError: another llama-cpp-python has been imported before, or the install is incomplete.
    """
    if "llama_cpp" not in sys.modules:
        _import_private_copy()
    library: ctypes.CDLL = importlib.import_module("llama_cpp.llama_cpp")._lib
    if not hasattr(library, "refreekv_abi_version"):
        raise ImportError(
            f"another llama-cpp-python was imported before refreekv_cpp, and has loaded {library._name}; "
            "import refreekv_cpp before llama_cpp, and before every module that imports llama_cpp"
        )
    return library


# at import, before any other module of this package imports llama_cpp
library = _load()
