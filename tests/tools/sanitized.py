"""The tests of the cache with sanitizers: docs/development/testing.md.

    python tests/tools/sanitized.py [--sanitizer address | thread] [--folder DIR] [-D NAME=VALUE ...] [TEST ...]

"address" is AddressSanitizer with UndefinedBehaviorSanitizer, "thread" is ThreadSanitizer. Builds the library and the
server (long the first time), runs the tests on them and prints what was found. The exit code is 1 where something was
found, or a test failed. Linux and GCC.
"""

from __future__ import annotations

import enum
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


class Sanitizer(enum.Enum):
    ADDRESS = "address"
    THREAD = "thread"


# the tests that go through native/ most, and need no real model
TESTS = {
    Sanitizer.ADDRESS: [
        "cache",
        "tiers",
        "evict",
        "graph",
        "kernels",
        "library",
        "state",
        "llama/test_spans.py",
        "llama/test_images.py",
    ],
    # those with threads in them: readers of statistics, several Llama objects, one library, cold stores, slots
    Sanitizer.THREAD: [
        "reliability/test_threads.py",
        "llama/test_statistics.py",
        "tiers",
        "library",
        "server/test_slots.py",
        "server/test_slots_library.py",
    ],
}
COMPILED = {Sanitizer.ADDRESS: "address,undefined", Sanitizer.THREAD: "thread"}
RUNTIME = {Sanitizer.ADDRESS: "libasan.so", Sanitizer.THREAD: "libtsan.so"}

# A race of llama.cpp's own, without consequences: while llama-server loads a model, it assigns its options to
# themselves, and each request that it answers with 503 meanwhile reads those for other origins.
SUPPRESSED = "race:server_http_context::init_listener\n"

FINDING = re.compile(r"^(?:.*: runtime error: .*|==\d+==ERROR: .*|SUMMARY: .*)$", re.MULTILINE)


def install(folder: Path) -> Path:
    """The Python package with the library that was built in `folder`; returns where Python finds it."""
    package = folder / "package"
    subprocess.run(["cmake", "--install", str(folder), "--component", "refreekv", "--prefix", str(package)], check=True)
    ours = shutil.ignore_patterns("lib", "upstream", "_binding.py", "__pycache__")
    shutil.copytree(ROOT / "src" / "refreekv_cpp", package / "refreekv_cpp", ignore=ours, dirs_exist_ok=True)
    return package


def preload(sanitizer: Sanitizer) -> str:
    """The sanitizer's own library, which has to be there before Python's first allocation, and the C++ library, whose
    exceptions it watches."""
    compiler = os.environ.get("CXX", "c++")
    paths = []
    for name in (RUNTIME[sanitizer], "libstdc++.so"):
        done = subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
        path = Path(done.stdout.strip())
        if not path.is_absolute():
            raise SystemExit(f"{compiler} has no {name}: a GCC with its sanitizer runtimes is needed")
        paths.append(str(path.resolve()))
    return " ".join(paths)


def main(
    tests: Annotated[list[str] | None, typer.Argument(help="For pytest; by default those in this file.")] = None,
    sanitizer: Annotated[Sanitizer, typer.Option(help="Which one.")] = Sanitizer.ADDRESS,
    folder: Annotated[Path | None, typer.Option(help="Where the build goes; by default build/sanitize-NAME.")] = None,
    define: Annotated[list[str] | None, typer.Option("-D", help="More CMake definitions, NAME=VALUE.")] = None,
) -> None:
    folder = (folder or ROOT / "build" / f"sanitize-{sanitizer.value}").resolve()
    definitions = [f"REFREEKV_SANITIZE={COMPILED[sanitizer]}", *(define or [])]
    if sanitizer is Sanitizer.THREAD:  # it does not see how OpenMP's threads wait for each other
        definitions.append("GGML_OPENMP=OFF")
    build(folder, definitions, ["llama", "mtmd", "llama-server", "refreekv_binding"])
    package = install(folder)

    for old in folder.glob("report.*"):
        old.unlink()
    suppressions = folder / "suppressions"
    suppressions.write_text(SUPPRESSED)
    # A file for each process: some tests silence stderr, and a server is a process of its own
    log = f"log_path={folder / 'report'}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(package),
        "LD_PRELOAD": preload(sanitizer),
        # Python and NumPy keep much until the process ends
        "ASAN_OPTIONS": f"{log}:detect_leaks=0",
        "UBSAN_OPTIONS": f"{log}:print_stacktrace=1:halt_on_error=1",
        # a test may fork while there are threads; an exit code of its own would be taken for a failed test of a program
        "TSAN_OPTIONS": f"{log}:suppressions={suppressions}:die_after_fork=0:exitcode=0:history_size=4",
    }
    pytest = [sys.executable, "-m", "pytest", "-s", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    paths = [ROOT / "tests" / name for name in TESTS[sanitizer]]
    selected = [str(Path(test).resolve()) if Path(test).exists() else test for test in tests or map(str, paths)]
    code = subprocess.run([*pytest, *selected], cwd=package, env=environment).returncode

    reports = sorted(folder.glob("report.*"))
    findings = [line for report in reports for line in FINDING.findall(report.read_text(errors="replace"))]
    print("\n".join(["", *sorted(set(findings))] if findings else ["the sanitizer found nothing"]))
    print(*(f"with stacks: {report}" for report in reports), sep="\n")
    raise SystemExit(int(code != 0 or bool(findings)))


if __name__ == "__main__":
    typer.run(main)
