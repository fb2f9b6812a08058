"""The private copy of llama-cpp-python, alone and beside another one."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import refreekv_cpp
from refreekv_cpp import _llama_cpp

# what `pip install` of another llama-cpp-python would bring: a package with a library of its own
_OTHER = """\
import ctypes
from llama_cpp.llama_cpp import _lib
__version__ = "0.2.0"
class LlamaGrammar: pass
"""


def run(code: str, *folders: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program, with these folders before the installed packages."""
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    package = tmp_path / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").write_text(_OTHER)
    (package / "llama_cpp.py").write_text("import ctypes\n_lib = ctypes.CDLL(None)\n")
    return tmp_path


def test_llama_cpp_is_the_private_copy_after_an_import_of_ours() -> None:
    done = run("import refreekv_cpp, llama_cpp; print(llama_cpp.__file__); import llama_cpp.llama_speculative")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent.parent == _llama_cpp.python_dir()


@pytest.mark.skipif(importlib.util.find_spec("refreekv_llama_cpp") is None, reason="the package is not installed")
def test_without_another_one_the_order_of_imports_does_not_matter() -> None:
    done = run(
        "from llama_cpp import LlamaGrammar\n"
        "from refreekv_cpp import Llama\n"
        "import llama_cpp, refreekv_cpp\n"
        "assert llama_cpp.LlamaGrammar is LlamaGrammar and issubclass(Llama, llama_cpp.Llama)\n"
        "import refreekv_cpp.llama; assert refreekv_cpp.llama.llama_cpp is llama_cpp; llama_cpp._internals\n"
        "assert llama_cpp.__spec__.submodule_search_locations\n"
        "import llama_cpp.llama_speculative\n"
    )
    assert done.returncode == 0, done.stderr


def test_another_one_works_alone(other: Path) -> None:
    done = run("import llama_cpp; print(llama_cpp.__version__)", other)
    assert done.stdout.strip() == "0.2.0", done.stderr


def test_ours_takes_its_own_beside_another_one(other: Path) -> None:
    done = run("import refreekv_cpp, llama_cpp; print(llama_cpp.__file__)", other)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent.parent == _llama_cpp.python_dir()


def test_another_one_imported_before_ours_is_one_clear_sentence(other: Path) -> None:
    done = run("from llama_cpp import LlamaGrammar; from refreekv_cpp import Llama", other)
    assert done.returncode != 0
    assert "ImportError: another llama-cpp-python was imported before refreekv_cpp" in done.stderr
    assert "import refreekv_cpp before llama_cpp" in done.stderr


def test_the_variables_that_lead_llama_cpp_to_another_library_are_not_followed(tmp_path: Path) -> None:
    code = (
        "import os, refreekv_cpp; assert os.environ['LLAMA_CPP_LIB_PATH'] == 'mine'; "
        "assert 'MTMD_CPP_LIB' not in os.environ; print(refreekv_cpp.native.library._name)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MTMD_CPP_LIB"}
    environment["LLAMA_CPP_LIB_PATH"] = "mine"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert Path(done.stdout.strip()).parent == _llama_cpp.library_dir(), done.stderr


def test_a_cpu_backend_that_is_not_here_is_refused() -> None:
    done = run("import refreekv_cpp", REFREEKV_CPU="z80")
    assert done.returncode != 0
    assert "ImportError: REFREEKV_CPU=z80: " in done.stderr


def test_the_licences_of_what_is_inside_are_there() -> None:
    folders = [Path(folder) / "licenses" for folder in refreekv_cpp.__path__]
    with contextlib.suppress(metadata.PackageNotFoundError):
        files = metadata.files("refreekv-cpp") or []
        folders += {Path(file.locate()).parent for file in files if file.parent.name == "licenses"}
    names = {file.name for folder in folders for file in folder.glob("LICENSE-*.txt")}
    for name in ("llama.cpp", "llama-cpp-python", "miniaudio", "stb_image", "xxHash", "llamafile"):
        assert f"LICENSE-{name}.txt" in names
