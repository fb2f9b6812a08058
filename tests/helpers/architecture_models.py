"""A model of every architecture of llama.cpp: those of its program `test-llama-archs`, and ours where it makes none."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from native_build import ROOT, build
from tiny_architectures import ARCHITECTURES, DRAFTS, OTHERS, UNKNOWN

FOLDER = ROOT / "build" / "stock"
"""Of upstream's own library and of the program."""


def build_program() -> None:
    # not all of upstream's tests, which take minutes
    definitions = ["REFREEKV_STOCK=ON", "REFREEKV_UPSTREAM_TESTS=ON"]
    build(FOLDER, definitions, ["llama", "mtmd", "refreekv_architectures"])


def write_models(folder: Path, tiny: Callable[[str], Path], *, all_of_ours: bool = False) -> tuple[int, list[str]]:
    """Write them to a folder that is there. Returns how many upstream has made, and the architectures it leaves out.

    Args:
        tiny: writes a model of ours (`tiny_architectures.tiny_models`).
        all_of_ours: also models of ours whose architecture upstream makes one of, and those that have no text to
            complete or draft for another model.
    """
    log = subprocess.run(
        [str(FOLDER / "bin" / "refreekv_architectures"), "-s", "1234", "-o", str(folder)],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ).stdout
    n_saved = len(re.findall(r": Saving \S+ model", log))
    assert n_saved == len(list(folder.iterdir()))

    theirs = {path.stem.rpartition("-")[0] for path in folder.iterdir()}
    ours = {**ARCHITECTURES, **({**OTHERS, **DRAFTS, **UNKNOWN} if all_of_ours else {})}
    for title, architecture in ours.items():
        if all_of_ours or architecture.name not in theirs:
            (folder / f"{title}.gguf").symlink_to(tiny(title))
    return n_saved, re.findall(r"(\S+) model \(\S+\) is unsupported, skipping", log)
