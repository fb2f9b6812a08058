"""Runs llama-cpp-python's own tests on our `Llama`, and on stock llama-cpp-python for comparison; writes a table."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import _helpers  # noqa: F401  (first: it makes the other imports possible)
import typer
from native_build import ROOT, stock_environment
from tiny_architectures import ENCODER, tiny_models

NAMES = ("stock", "full", "refreekv")

# the file a test would download -> one that is made here, or None: the model of the command line
STAND_INS = {
    "Qwen3.5-0.8B-Q8_0.gguf": None,
    "tinyllamas/stories15M-q4_0.gguf": None,
    "bge-small-en-v1.5-q4_k_m.gguf": ENCODER.title,
    "mamba-130m-hf.Q2_K.gguf": "mamba (recurrent)",
    "Falcon-H1-Tiny-90M-Instruct-Q2_K.gguf": "falcon-h1 (hybrid)",
}

_HEAD = """\
# llama-cpp-python's own tests

The test files of llama-cpp-python's sdist, run with stock llama-cpp-python, and with `refreekv_cpp.Llama` in place of
`llama_cpp.Llama` (`refreekv`: evicting cell by cell, since these prompts are shorter than a block). Written by

```sh
python tests/tools/run_upstream_tests.py SDIST_FOLDER --model {model} --stock STOCK_LIBRARY_FOLDER
```

The models they would download are replaced: the transformers by {model},
the others by tiny random ones. What fails with stock, too, expects the words of a model that was replaced.

| test | stock | full | refreekv | cells evicted | note |
|---|---|---|---|---|---|
"""

Results = dict[str, dict[str, Any]]


def run(name: str, sdist: Path, stock: Path, models: Path, out: Path) -> Results:
    """In a process of its own: two libllama do not go into one."""
    child = ROOT / "tests" / "tools" / "upstream_tests_child.py"
    subprocess.run(
        [sys.executable, str(child), name, str(models), str(out)],
        cwd=sdist,
        env=stock_environment(stock) if name == "stock" else None,
        stdout=sys.stderr,
        check=True,
    )
    return dict(json.loads(out.read_text()))


def verdict(result: dict[str, Any]) -> str:
    return "refused" if "UnsupportedModelError" in result["reason"] else str(result["outcome"])


def row(test: str, results: dict[str, dict[str, Any]]) -> str:
    verdicts = {name: verdict(results[name]) for name in NAMES}
    reasons = {results[name]["reason"] for name in NAMES if verdicts[name] != "passed"}
    note = " / ".join(sorted(reasons)).replace("refreekv_cpp.errors.", "").replace("|", "\\|")
    evicted = results["refreekv"]["evicted"] or ""
    name = test.removeprefix("tests/")
    return " | ".join(["", name, *verdicts.values(), str(evicted), note, ""]).replace("  ", " ").strip()


def main(
    sdist: Annotated[Path, typer.Argument(help="The unpacked sdist of the pinned llama-cpp-python.")],
    model: Annotated[Path, typer.Option(help="A small chat model of the llama architecture, a GGUF file.")],
    stock: Annotated[Path, typer.Option(help="The folder of a stock libllama (-DREFREEKV_STOCK=ON).")],
    out: Annotated[Path, typer.Option(help="Where the table goes.")] = ROOT / "docs" / "upstream-tests.md",
) -> None:
    """Run llama-cpp-python's own tests with stock, full and refreekv. Exit code 1: one passes with stock only."""
    for path, what in ((sdist / "tests", "no tests"), (model, "no such file"), (stock, "no such folder")):
        if not path.exists():
            raise typer.BadParameter(f"{path}: {what}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tiny = tiny_models(folder)
        models = folder / "models.json"
        models.write_text(
            json.dumps({file: str(tiny(made) if made else model.resolve()) for file, made in STAND_INS.items()})
        )
        results = {name: run(name, sdist.resolve(), stock.resolve(), models, folder / f"{name}.json") for name in NAMES}

    tests = list(results["stock"])
    by_test = {test: {name: results[name][test] for name in NAMES} for test in tests}
    out.write_text(_HEAD.format(model=model.name) + "\n".join(row(test, by_test[test]) for test in tests) + "\n")
    broken = [
        test
        for test, each in by_test.items()
        if verdict(each["stock"]) == "passed" and any(verdict(each[name]) == "failed" for name in NAMES)
    ]
    for name in NAMES:
        verdicts = [verdict(result) for result in results[name].values()]
        print(f"{name}: {', '.join(f'{verdicts.count(each)} {each}' for each in sorted(set(verdicts)))}")
    if broken:
        print("pass with stock only:", *broken, sep="\n  ")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
