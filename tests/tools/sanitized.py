"""The tests of the cache with AddressSanitizer and UndefinedBehaviorSanitizer: docs/development/testing.md.

    python tests/tools/sanitized.py [--folder DIR] [-D NAME=VALUE ...] [TEST ...]

Builds the library (long the first time), runs the tests on it and prints what the sanitizers found. The first finding
ends the run; the exit code is then 1, as when a test fails. Linux and GCC.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import _helpers  # noqa: F401  (first: it makes the other imports possible)
import typer
from native_build import ROOT, build

# the tests that go through native/ most, and need neither a real model nor a second process
TESTS = [
    "cache",
    "tiers",
    "evict",
    "graph",
    "kernels",
    "library",
    "state",
    "llama/test_spans.py",
    "llama/test_images.py",
]

FINDING = re.compile(r"^(?:.*: runtime error: .*|==\d+==ERROR: .*|SUMMARY: .*)$", re.MULTILINE)


def install(folder: Path) -> Path:
    """The Python package with the library that was built in `folder`; returns where Python finds it."""
    package = folder / "package"
    subprocess.run(["cmake", "--install", str(folder), "--component", "refreekv", "--prefix", str(package)], check=True)
    ours = shutil.ignore_patterns("lib", "upstream", "_binding.py", "__pycache__")
    shutil.copytree(ROOT / "src" / "refreekv_cpp", package / "refreekv_cpp", ignore=ours, dirs_exist_ok=True)
    return package


def preload() -> str:
    """The sanitizer's own library, which has to be there before Python's first allocation, and the C++ library, whose
    exceptions it watches."""
    compiler = os.environ.get("CXX", "c++")
    paths = []
    for name in ("libasan.so", "libstdc++.so"):
        done = subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
        path = Path(done.stdout.strip())
        if not path.is_absolute():
            raise SystemExit(f"{compiler} has no {name}: a GCC with its sanitizer runtime is needed (libasan)")
        paths.append(str(path.resolve()))
    return " ".join(paths)


def main(
    tests: Annotated[list[str] | None, typer.Argument(help=f"For pytest; by default {', '.join(TESTS)}")] = None,
    folder: Annotated[Path, typer.Option(help="Where the build goes.")] = ROOT / "build" / "sanitize",
    define: Annotated[list[str] | None, typer.Option("-D", help="More CMake definitions, NAME=VALUE.")] = None,
) -> None:
    folder = folder.resolve()
    build(folder, ["REFREEKV_SANITIZE=address,undefined", *(define or [])], ["llama", "mtmd", "refreekv_binding"])
    package = install(folder)

    environment = {
        **os.environ,
        "PYTHONPATH": str(package),
        "LD_PRELOAD": preload(),
        # Python and NumPy keep much until the process ends
        "ASAN_OPTIONS": "detect_leaks=0",
        # some tests silence stderr for a while: only a process that ends cannot be overlooked
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    # -s: else pytest keeps what it caught to itself when the process ends
    pytest = [sys.executable, "-m", "pytest", "-s", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    paths = [ROOT / "tests" / name for name in TESTS]
    selected = [str(Path(test).resolve()) if Path(test).exists() else test for test in tests or map(str, paths)]
    report = folder / "report.txt"
    with report.open("w") as stderr:
        code = subprocess.run([*pytest, *selected], cwd=package, env=environment, stderr=stderr).returncode

    findings = FINDING.findall(report.read_text(errors="replace"))
    print("\n".join(["", *findings] if findings else ["the sanitizers found nothing"]))
    print(f"what the tests wrote to stderr, with the stacks: {report}")
    raise SystemExit(int(code != 0 or bool(findings)))


if __name__ == "__main__":
    typer.run(main)
