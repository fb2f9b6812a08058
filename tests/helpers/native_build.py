"""Builds of the native part next to the one that is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from refreekv_cpp._llama_cpp import python_dir

ROOT = Path(__file__).parents[2]


def build(folder: Path, definitions: Iterable[str], targets: Iterable[str]) -> None:
    """Configure (with these -D definitions) and build in a folder; minutes the first time. Its output goes to stderr.

    Raises:
        subprocess.CalledProcessError: what failed has been printed.
    """
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    stderr = sys.__stderr__
    subprocess.run([*configure, *(f"-D{definition}" for definition in definitions)], check=True, stdout=stderr)
    subprocess.run(["cmake", "--build", str(folder), "--target", *targets], check=True, stdout=stderr)


def upstream_tree() -> Path:
    """llama.cpp's sources as they are built here, for their headers."""
    folder = ROOT / "build" / "headers"
    source = ["--source", os.environ["REFREEKV_UPSTREAM_DIR"]] if "REFREEKV_UPSTREAM_DIR" in os.environ else []
    subprocess.run(
        [
            *[sys.executable, str(ROOT / "cmake" / "prepare_upstream.py"), str(folder), *source],
            *["--downloads", str(ROOT / "build" / "downloads")],
        ],
        check=True,
        stdout=sys.__stderr__,
    )
    return folder / "llama.cpp"


def stock_environment(library: Path) -> dict[str, str]:
    """The environment of a process whose `llama_cpp` is the pinned llama-cpp-python on this stock library."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(python_dir()), os.environ.get("PYTHONPATH", "")]),
        "LLAMA_CPP_LIB_PATH": str(library),
        "MTMD_CPP_LIB": str(library),
    }


def stock_library(definitions: Iterable[str] = ()) -> Path:
    """The folder of a stock libllama: $REFREEKV_STOCK_LIB, or built here (minutes, the first time)."""
    if library := os.environ.get("REFREEKV_STOCK_LIB"):
        return Path(library)
    folder = ROOT / "build" / "stock"
    build(folder, ["REFREEKV_STOCK=ON", *definitions], ["llama", "mtmd"])
    return folder / "bin"
