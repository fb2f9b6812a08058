"""llama.cpp's own tests of the cache, on upstream's library and on ours: docs/development/testing.md.

    python tests/tools/upstream_ctests.py [--folder DIR] [--model GGUF] [-D NAME=VALUE ...]

Builds our library with the tests, and upstream's (long the first time), runs the programs on both and prints the table.
The exit code is 1 when a test that passes on upstream's library fails on ours. Linux, where LD_LIBRARY_PATH decides
which library a program gets.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import _helpers  # noqa: F401  (first: it makes the other imports possible)
import typer
from native_build import ROOT, build, stock_library
from rich.console import Console

from refreekv_cpp.default_model import default_model

SEED = "1234"
VARIABLES = ("REFREEKV_NATIVE_POLICY", "REFREEKV_NATIVE_PRUNE", "LD_LIBRARY_PATH")
TIMEOUT = 1800  # seconds, of one test

# REFREEKV_NATIVE_POLICY and REFREEKV_NATIVE_PRUNE of each column; None: upstream's library
CONFIGURATIONS: dict[str, dict[str, str] | None] = {
    "upstream": None,
    "ours, no policy": {},
    "`elastic`": {"REFREEKV_NATIVE_POLICY": "elastic"},
    "`streaming`, prunes": {"REFREEKV_NATIVE_POLICY": "streaming", "REFREEKV_NATIVE_PRUNE": "tests"},
    "`refreekv`, prunes": {"REFREEKV_NATIVE_POLICY": "refreekv", "REFREEKV_NATIVE_PRUNE": "tests"},
}

# the program and its arguments; {models}: a folder with a tiny model of each architecture, {model}: one real model
TESTS: dict[str, list[str]] = {
    "every architecture": ["test-llama-archs", "-s", SEED, "-v", "4"],
    "states, every architecture": ["test-save-load-state", "--models", "{models}"],
    "states": ["test-save-load-state", "-m", "{model}", "-lv", "4"],
    "state into a fragmented cache": ["test-state-restore-fragmented", "-m", "{model}", "-lv", "4"],
    "threads": [
        *["test-thread-safety", "-m", "{model}", "-p", "The meaning of life is " * 12],
        *["-n", "32", "-c", "256", "-ub", "32", "-np", "4", "-t", "1", "-lv", "4"],
    ],
    "operations of the backends": ["test-backend-ops", "test"],
}

# models whose line fails in its last column (`rf`) once cells are evicted, and why that is no fault of the cache
KNOWN = {
    "qwen3-dense.gguf": "`rf` damages the bytes of a state from 4096 to 3/4 of it, and expects that to hit more than "
    "keys and values. In this pruned state (6652 bytes) it does not; states have no checksum, upstream's neither.",
}

console = Console(stderr=True)


@dataclass(frozen=True)
class Outcome:
    code: int
    output: str
    prunes: bool = False

    @property
    def failures(self) -> list[str]:
        """The lines of the program's table in which something failed."""
        plain = re.sub(r"\x1b\[[0-9;]*m", "", self.output)
        return [line for line in plain.splitlines() if re.search(r"\bFAIL\b", line)]

    @property
    def known(self) -> bool:
        """Nothing failed but what is in `KNOWN`."""
        lines = [line.split() for line in self.failures]
        return (
            self.prunes
            and bool(lines)
            and all(line[0] in KNOWN and line.index("FAIL") == len(line) - 1 for line in lines)
        )

    def cell(self) -> str:
        """Of the table: how it ended, and in how many contexts a policy was at work (where the program logs it)."""
        ended = "passes" if self.code == 0 else f"**fails** ({len(self.failures) or f'exit code {self.code}'})"
        if self.known:
            ended = f"passes but for {', '.join(f'`{line.split()[0]}`' for line in self.failures)}"
        n_contexts = self.output.count("refreekv: the cache starts empty")
        n_evicted = sum(map(int, re.findall(r"refreekv: sequence \d+: (\d+) cells evicted", self.output)))
        notes = [f"{n_contexts} context{'s' * (n_contexts > 1)}"] if n_contexts else []
        notes += [f"{n_evicted} cells evicted"] if n_evicted else []
        return ended + (f"; {', '.join(notes)}" if notes else "")


def run(folder: Path, command: list[str], environment: dict[str, str]) -> Outcome:
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    prunes = "REFREEKV_NATIVE_PRUNE" in environment
    try:
        done = subprocess.run(
            [str((folder / "bin" / command[0]).resolve()), *command[1:]],
            cwd=folder,
            env={**clean, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired as err:
        return Outcome(-1, (err.stdout or b"").decode(errors="replace") + f"\nended after {TIMEOUT} s", prunes)
    return Outcome(done.returncode, done.stdout.decode(errors="replace"), prunes)


def main(
    folder: Annotated[Path, typer.Option(help="Where the builds and the logs go.")] = ROOT / "build" / "upstream-tests",
    model: Annotated[Path | None, typer.Option(help="A GGUF file; by default SmolLM2-135M, fetched once.")] = None,
    define: Annotated[list[str] | None, typer.Option("-D", help="More CMake definitions, NAME=VALUE.")] = None,
) -> None:
    folder = folder.resolve()
    stock = {"LD_LIBRARY_PATH": str(stock_library(define or []))}
    build(folder, ["REFREEKV_UPSTREAM_TESTS=ON", *(define or [])], ["refreekv_upstream_tests"])

    models = folder / "models"
    models.mkdir(exist_ok=True)
    generated = run(folder, ["test-llama-archs", "-s", SEED, "-o", str(models)], stock)
    if generated.code != 0:
        raise SystemExit(f"test-llama-archs -o failed:\n{generated.output[-2000:]}")
    places = {"models": str(models), "model": str(model or default_model())}

    print(f"| | {' | '.join(CONFIGURATIONS)} |\n|{'---|' * (len(CONFIGURATIONS) + 1)}", flush=True)
    ours_alone = False
    for test, command in TESTS.items():
        command = [argument.format_map(places) for argument in command]
        outcomes = []
        for i, (name, environment) in enumerate(CONFIGURATIONS.items()):
            console.print(f"{test}: {name} ...")
            outcome = run(folder, command, stock if environment is None else environment)
            (folder / f"{test.replace(' ', '-').replace(',', '')}.{i}.log").write_text(outcome.output)
            outcomes.append(outcome)
        ours_alone |= outcomes[0].code == 0 and any(outcome.code != 0 and not outcome.known for outcome in outcomes)
        print(f"| {test}: `{command[0]}` | {' | '.join(outcome.cell() for outcome in outcomes)} |", flush=True)
    for name, why in KNOWN.items():
        print(f"\n`{name}`: {why}")
    raise SystemExit(int(ours_alone))


if __name__ == "__main__":
    typer.run(main)
