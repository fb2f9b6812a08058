"""Damaged and made-up inputs, guided by the code that they reach (libFuzzer): docs/development/reliability.md.

    python tests/fuzz/libfuzzer.py [--target state --target block ...] [--inputs 1000000] [--seconds 0] [--folder DIR]

Builds the library with AddressSanitizer, UndefinedBehaviorSanitizer and coverage of native/ (long the first time; the
same build as that of tests/tools/sanitized.py), and one program for each target from its C++ file beside this one. A
target begins with valid inputs, which it makes itself, and with what earlier runs have found to reach new code. An
input that ends the process, takes more than 10 s, or allocates more than 64 MiB at once is kept, and can be given to
the program again: the command is printed. Linux, GCC, and clang's libFuzzer (Debian: clang and libclang-rt-14-dev).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import typer
from native_build import ROOT, build
from tiny import TinyModel

HERE = Path(__file__).parent
TARGETS = ["state", "whole_state", "block", "calls"]
FLAGS = ["-std=c++17", "-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]

_N_MOST = 1 << 18  # bytes of an input; valid ones have some 50,000


def runtime() -> Path:
    """libFuzzer, which comes with clang.

    Raises:
        FileNotFoundError: it is not there.
    """
    done = subprocess.run(["clang++", "-print-runtime-dir"], check=True, capture_output=True, text=True)
    path = Path(done.stdout.strip()) / f"libclang_rt.fuzzer-{platform.machine()}.a"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: clang's runtime libraries are needed (Debian: libclang-rt-dev)")
    return path


def model(folder: Path) -> Path:
    """The smallest model that has all of it: two layers, and heads that our kernels take."""
    path = folder / "tiny.gguf"
    TinyModel(n_layer=2, n_embd=32, n_head=2, n_head_kv=1, n_embd_head=16, n_ff=32).write(path)
    return path


def compile_target(name: str, build_folder: Path) -> Path:
    """A program from NAME.cpp."""
    path = build_folder / f"fuzz-{name}"
    upstream, libraries = build_folder / "llama.cpp", build_folder / "bin"
    includes = [ROOT / "native", upstream / "include", upstream / "ggml" / "include", upstream / "vendor" / "hash"]
    command = [os.environ.get("CXX", "c++"), *FLAGS, *(f"-I{each}" for each in includes), str(HERE / f"{name}.cpp")]
    link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lllama", "-lggml", "-lggml-base", "-lpthread", "-rdynamic"]
    # target.h has calls of its own in the place of some of libFuzzer's
    link += [str(runtime()), "-Wl,--allow-multiple-definition"]
    subprocess.run([*command, "-o", str(path), *link], check=True)
    return path


def environment(folder: Path) -> dict[str, str]:
    """What a target needs, whose files lie in this folder."""
    for name in ("library", "seeds", "history"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("seeds", "history"):
        (folder / name).mkdir(parents=True)
    return {
        **os.environ,
        "REFREEKV_FUZZ_MODEL": str(model(folder)),
        "REFREEKV_FUZZ_FOLDER": str(folder),
        # libFuzzer keeps the input where a signal ends the process
        # and little memory is kept from being used again, which would be new pages for each input
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:quarantine_size_mb=8:malloc_context_size=4"
        ":allocator_release_to_os_interval_ms=-1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:abort_on_error=1",
    }


def fuzz(program: Path, folder: Path, inputs: int, seconds: int) -> bool:
    """Whether nothing was found."""
    corpus, found = folder / "corpus", folder / "found"
    for each in (corpus, found):
        each.mkdir(parents=True, exist_ok=True)
    options = {
        "runs": inputs,
        "max_total_time": seconds,
        "timeout": 10,
        "detect_leaks": 0,
        "malloc_limit_mb": 64,
        "rss_limit_mb": 2048,
        "max_len": _N_MOST,
        "len_control": 0,
        "artifact_prefix": f"{found}/",
    }
    env = environment(folder)
    log = folder / "log"
    command = [str(program), str(corpus), str(folder / "seeds")]
    command += [f"-{name}={value}" for name, value in options.items()]
    with log.open("wb") as stderr:
        code = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=stderr).returncode
    said = log.read_text(errors="replace")
    n = re.findall(r"^#(\d+)\s", said, re.MULTILINE)  # the last one before a finding, too
    reached = re.findall(r"ft: (\d+)", said)
    print(f"{program.name}: {n[-1] if n else '?'} inputs, {reached[-1] if reached else '?'} features", flush=True)
    if code:
        variables = " ".join(f"{name}={env[name]}" for name in env if name.startswith("REFREEKV_FUZZ"))
        print(f"BAD: {log} says why; again: {variables} {program} {found}/...", flush=True)
    return code == 0


def main(
    target: Annotated[list[str] | None, typer.Option(help=f"Some of: {', '.join(TARGETS)}.")] = None,
    inputs: Annotated[int, typer.Option(help="Of each target.")] = 1_000_000,
    seconds: Annotated[int, typer.Option(help="For each target at most; 0: no limit.")] = 0,
    folder: Annotated[Path, typer.Option(help="Where inputs and what is found go.")] = ROOT / "build" / "fuzz",
) -> None:
    built = ROOT / "build" / "sanitize-address"
    build(built, ["REFREEKV_SANITIZE=address,undefined"], ["llama"])
    good = True
    for name in target or TARGETS:
        good = fuzz(compile_target(name, built), folder.resolve() / name, inputs, seconds) and good
    raise SystemExit(not good)


if __name__ == "__main__":
    typer.run(main)
