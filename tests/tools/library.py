"""Damage and killed writers, many times over: docs/results/documents.md.

    python tests/tools/library.py [--damaged 1000] [--kills 50] [--seed 0]

On tiny models: one that sees everything, and one with a sliding window, whose text has a state, too. Each damaged block
or state has to be a miss that leaves the answer what it was; after each killed writer the library has to hold whole
files only, and nothing else once it has been opened.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import _helpers  # noqa: F401  (first: it makes the other imports possible)
import numpy as np
import typer
from books import QUESTION, TEXT, reader, write
from support import HELPERS, logits
from tiny_architectures import tiny_models

from refreekv_cpp._library import Library

_N_HEAD = 1600  # bytes before the codes, about


def damage(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    kind = str(rng.choice(["bit in the head", "bit in the codes", "bit anywhere", "cut", "version"]))
    if kind == "cut":
        return kind, data[: int(rng.integers(len(data)))]
    if kind == "version":
        return kind, data[:4] + bytes(rng.integers(2, 256, 1, dtype=np.uint8)) + data[5:]
    end = {"bit in the head": _N_HEAD, "bit in the codes": len(data) // 4}.get(kind, len(data))
    damaged = bytearray(data)
    damaged[int(rng.integers(end))] ^= 1 << int(rng.integers(8))
    return kind, bytes(damaged)


def damaged_files(model: Path, folder: Path, suffix: str, n: int, rng: np.random.Generator) -> None:
    # on codes, what is read behind a part of the text would be other numbers
    write(model, folder, kv_evicted="restore")
    llm = reader(model, folder, kv_evicted="restore")
    prompt = [*TEXT, *QUESTION]

    def answer() -> np.ndarray:
        llm.reset()
        llm._prepare(prompt, reset=True)  # as a completion does before it reads
        n_opened = llm.n_tokens
        llm.eval(prompt[n_opened:])
        res = logits(llm)
        llm.reset()
        return np.append(res, n_opened)

    whole = {path: path.read_bytes() for path in sorted(folder.glob(f"*{suffix}"))}
    expected = answer()
    assert expected[-1] == len(TEXT)
    misses: Counter[str] = Counter()
    for _ in range(n):
        path = list(whole)[int(rng.integers(len(whole)))]
        kind, data = damage(whole[path], rng)
        path.write_bytes(data)
        res = answer()
        np.testing.assert_allclose(res[:-1], expected[:-1], atol=1e-3)
        if res[-1] < len(TEXT):
            assert not path.exists()
            misses[kind] += 1
        else:
            # a bit between two sections, where nothing is read
            same = np.frombuffer(data, np.uint8) == np.frombuffer(whole[path], np.uint8)
            assert whole[path][int(np.argmin(same))] == 0
            misses["unused byte"] += 1
        path.write_bytes(whole[path])
    print(f"{n} damaged {suffix} files, each a miss with the right answer: {dict(misses)}")


WRITER = """
import sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from books import files, read, reader
folder = Path(sys.argv[2])
llm = read(reader(Path(sys.argv[1]), folder))
print("ready", flush=True)
while True:
    llm.keep_kv()
    for path in files(folder):
        path.unlink()
"""


def killed_writers(model: Path, folder: Path, n: int, rng: np.random.Generator) -> None:
    left: Counter[str] = Counter()
    for _ in range(n):
        command = [sys.executable, "-c", WRITER, str(model), str(folder), str(HELPERS)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            process.stdout.readline()
            time.sleep(float(rng.uniform(0, 0.3)))
            process.kill()
        left["temporary files"] += len([path for path in folder.iterdir() if path.suffix == ".tmp"])
        library = Library(folder)
        n_good, errors = library.check_all()
        assert errors == []
        left["whole blocks"] += n_good
        assert [path for path in folder.iterdir() if path.suffix == ".tmp"] == []
    print(f"{n} killed writers left {dict(left)}; no damaged block, nothing after the next start")


def main(damaged: int = 1000, kills: int = 50, seed: int = 0) -> None:
    logging.getLogger("refreekv_cpp").setLevel(logging.ERROR)
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        tiny = tiny_models(Path(folder))
        damaged_files(tiny("gqa"), Path(folder) / "blocks", ".block", damaged, rng)
        damaged_files(tiny("gemma3 (sliding window)"), Path(folder) / "states", ".state", damaged, rng)
        killed_writers(tiny("gqa"), Path(folder) / "killed", kills, rng)


if __name__ == "__main__":
    typer.run(main)
