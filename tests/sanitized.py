"""The tests of the cache on a library built with AddressSanitizer and UndefinedBehaviorSanitizer: docs/testing.md.

    python tests/sanitized.py [--folder DIR] [-D NAME=VALUE ...] [TEST ...]

Builds the library (long the first time), runs the tests on it and prints what the sanitizers found. The exit code is 1
when a test fails or something was found in native/. Linux and GCC.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from native_build import ROOT, build

# the tests that go through native/ most, and need neither a real model nor a second process
TESTS = ["test_random_operations.py", "test_cache_operations.py", "test_sequence_states.py", "test_memory.py"]

FINDING = re.compile(r"^(?:.*: runtime error: .*|==\d+==ERROR: .*|SUMMARY: .*)$", re.MULTILINE)


def install(folder: Path) -> Path:
    """The Python package with the library that was built in `folder`; returns where Python finds it."""
    package = folder / "package"
    subprocess.run(["cmake", "--install", str(folder), "--component", "refreekv", "--prefix", str(package)], check=True)
    ours = shutil.ignore_patterns("lib", "_binding.py", "__pycache__")
    shutil.copytree(ROOT / "refreekv_cpp", package / "refreekv_cpp", ignore=ours, dirs_exist_ok=True)
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
    build(folder, ["REFREEKV_SANITIZE=address,undefined", *(define or [])], ["llama", "mtmd", "refreekv_binding"])
    package = install(folder)

    report = folder / "report.txt"
    environment = {
        **os.environ,
        "PYTHONPATH": str(package),
        "LD_PRELOAD": preload(),
        # Python and NumPy keep much until the process ends
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    # UBSan writes to stderr whatever log_path says, and pytest would keep that of tests that pass to itself (-s)
    pytest = [sys.executable, "-m", "pytest", "-s", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    selected = tests or [str(ROOT / "tests" / name) for name in TESTS]
    with report.open("w") as stderr:
        code = subprocess.run([*pytest, *selected], cwd=package, env=environment, stderr=stderr).returncode

    findings = sorted(set(FINDING.findall(report.read_text(errors="replace"))))
    ours = [finding for finding in findings if "/native/" in finding or "AddressSanitizer" in finding]
    print(f"found in native/, or by AddressSanitizer: {len(ours)}; elsewhere: {len(findings) - len(ours)} ({report})")
    for finding in findings:
        print(f"  {finding}")
    raise SystemExit(int(code != 0 or bool(ours)))


if __name__ == "__main__":
    typer.run(main)
