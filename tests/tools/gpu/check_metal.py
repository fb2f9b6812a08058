"""Checks our Metal kernels, and what calls them, as far as that goes without a Mac. Needs clang 14 or newer.

    python tests/tools/gpu/check_metal.py [FOLDER]

- native/kernels/device/decode.metal as C++ for OpenCL, which has the same kinds of memory: a pointer to one kind in
  place of another is an error, and so is a pointer or a reference of which the source does not say the kind, as in
  Metal's language.
- native/kernels/device/hooks-metal.cpp and the patched ggml-metal-ops.cpp and ggml-metal.cpp as C++, beside the headers
  of llama.cpp's Metal backend. What is in Objective-C is not checked, but for the header that it includes.

Prints what is wrong; the exit code is 1 then. FOLDER gets llama.cpp's patched sources (build/metal-check;
REFREEKV_UPSTREAM_DIR: an unpacked sdist of the pinned llama-cpp-python).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

# Clang takes a pointer that does not say what it points to for a "generic" one. What the compiler makes by itself, and
# the object of a method, may be that.
DECLARED = r"(?:VarDecl|FieldDecl) [^']* \w+ '[^']*__generic"
RETURNED = r"(?:FunctionDecl|CXXMethodDecl) [^']*'[^'(]*__generic[^'(]*\("
CONVERTED = r"(?:CStyleCastExpr|CXXFunctionalCastExpr|CXXReinterpretCastExpr) [^']*'[^']*__generic"
UNSPECIFIED = re.compile("|".join([DECLARED, RETURNED, CONVERTED]))


def check_kernels(native: Path) -> str:
    """What is wrong with the kernels of a folder like native/; an empty string if nothing is."""
    command = [
        "clang",
        "-x",
        "clcpp",
        "-cl-std=CLC++2021",
        "-target",
        "spir64",
        "-fsyntax-only",
        "-Wno-unknown-attributes",
    ]
    # variables of the program have to be constant
    command += [
        "-Xclang",
        "-cl-ext=-__opencl_c_program_scope_global_variables,-__opencl_c_device_enqueue",
        "-Xclang",
        "-ast-dump",
    ]
    command += [f"-I{native}", f"-I{ROOT / 'tests' / 'helpers' / 'metal'}", str(native / "kernels/device/decode.metal")]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        return run.stderr
    found = [
        line.strip(" |`-") for line in run.stdout.splitlines() if UNSPECIFIED.search(line) and " implicit " not in line
    ]
    return "".join(f"without a kind of memory: {line}\n" for line in found)


def check_host(folder: Path) -> str:
    """The same of what calls them."""
    source = ["--source", os.environ["REFREEKV_UPSTREAM_DIR"]] if "REFREEKV_UPSTREAM_DIR" in os.environ else []
    prepare = [
        sys.executable,
        str(ROOT / "cmake/prepare_upstream.py"),
        str(folder),
        "--downloads",
        str(folder / "downloads"),
    ]
    subprocess.run([*prepare, *source], check=True)
    ggml = folder / "llama.cpp/ggml"
    include = [f"-I{path}" for path in (ROOT / "native", ggml / "include", ggml / "src", ggml / "src/ggml-metal")]
    hooks = ROOT / "native/kernels/device"
    metal = ggml / "src/ggml-metal"
    cpp = ["clang++", "-std=c++17", "-fsyntax-only", *include]
    commands = [
        [*cpp, "-Wall", "-Wextra", "-Werror", str(hooks / "hooks-metal.cpp")],
        # Apple's headers bring <memory>
        [*cpp, "-w", "-include", "memory", str(metal / "ggml-metal-ops.cpp"), str(metal / "ggml-metal.cpp")],
        ["clang", "-w", "-std=c11", "-fsyntax-only", *include, "-x", "c", str(hooks / "hooks-metal.h")],
    ]
    runs = [subprocess.run(command, capture_output=True, text=True) for command in commands]
    return "".join(run.stderr for run in runs if run.returncode)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "metal-check"
    wrong = check_kernels(ROOT / "native") + check_host(folder)
    print(wrong or "nothing is wrong, as far as clang can tell")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
