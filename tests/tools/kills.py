"""A process is killed while it spills, writes to its library, or saves a conversation: docs/development/reliability.md.

    python tests/tools/kills.py [--kills 200] [--seed 0]

On tiny models. After each kill nothing may be left of the cold store, and the next start has to remove what was being
written, to find every file whole, and to answer right. POSIX systems.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _helpers  # noqa: F401  (first: it makes the other imports possible)
import numpy as np
import typer
from command import refreekv
from forked import forked
from support import feed, load, logits
from tiny import random_tokens
from tiny_architectures import tiny_models

from refreekv_cpp import Llama, ReFreeKV
from refreekv_cpp._cache_dir import VARIABLE
from refreekv_cpp.cli.sessions import Session

MODELS = ["gqa", "gemma3 (sliding window)", "jamba (hybrid)"]  # the last two have states beside their blocks
TEXTS = [random_tokens(n, seed=n) for n in (560, 900, 1100)]
QUESTION = random_tokens(30, seed=1)[1:]
MESSAGES = [[{"role": "user", "content": "a" * n}] for n in (10, 200_000)]


def reader(model: Path, folder: Path) -> Llama:
    return load(
        model,
        ReFreeKV(),
        codes=True,
        n_batch=256,
        kv_evicted="restore",
        kv_cold="file",
        kv_cold_dir=folder / "cold",
        kv_library=folder / "library",
    )


def answer(llm: Llama, prompt: list[int]) -> list[float]:
    generator = llm.generate(prompt, temp=0.0)
    next(generator)
    res = logits(llm)
    generator.close()
    return [float(x) for x in res]


def work(model: Path, folder: Path, seed: int) -> None:
    """Until it is killed."""
    rng = np.random.default_rng(seed)
    llm = reader(model, folder)
    session = Session("a")
    while True:
        text = TEXTS[int(rng.integers(len(TEXTS)))]
        answer(llm, text)
        feed(llm, QUESTION[:4])
        llm.keep_kv(f"text {int(rng.integers(3))}")
        llm.load_state(llm.save_state())
        session.write(MESSAGES[int(rng.integers(len(MESSAGES)))])
        if rng.random() < 0.5:  # it has to be written anew
            for path in (folder / "library").glob("*"):
                if path.is_file() and rng.random() < 0.3:
                    path.unlink()


def next_start(model: Path, folder: Path) -> list[Any]:
    llm = reader(model, folder)
    messages = Session("a").messages
    left = [path.name for path in folder.rglob("*.tmp")]
    checked = refreekv("library", "check", "--folder", folder / "library")
    assert messages == [] or messages in MESSAGES
    answers = [answer(llm, [*text, *QUESTION]) for text in TEXTS]
    n_opened = llm.kv_stats.n_opened
    llm.close()
    return [left, checked.exit_code, checked.stderr, answers, n_opened]


def main(kills: int = 200, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path_of = tiny_models(folder)
        for i, model_name in enumerate(MODELS):
            model, home = path_of(model_name), folder / f"home{i}"
            os.environ[VARIABLE] = str(home)
            n = kills // len(MODELS) + (i < kills % len(MODELS))

            def begin(do: Callable[[Path, Path], Any], model: Path = model, home: Path = home) -> tuple[Any, str]:
                (home / "cold").mkdir(parents=True, exist_ok=True)
                return forked(lambda: do(model, home))

            expected, ended = begin(next_start)
            assert not ended, ended
            shutil.rmtree(home)
            for k in range(n):
                (home / "cold").mkdir(parents=True, exist_ok=True)
                seconds = float(rng.uniform(0.02, 1.5))
                _, ended = forked(lambda: work(model, home, k), kill_after=seconds)  # noqa: B023
                assert ended == "SIGKILL", ended
                assert os.listdir(home / "cold") == []
                found["temporary files that were left"] += len(list(home.rglob("*.tmp")))
                found["files in the library"] += len(list((home / "library").glob("*")))
                result, ended = begin(next_start)
                assert not ended, ended
                left, code, said, answers, n_opened = result
                assert left == [], left
                assert code == 0, said
                for a, b in zip(answers, expected[3], strict=True):
                    np.testing.assert_allclose(a, b, atol=1e-3 * float(np.abs(b).max()))
                found["tokens that the next start opened"] += n_opened
                if rng.random() < 0.3:
                    shutil.rmtree(home)
    print(f"{kills} kills: {dict(found)}")
    print("Each next start removed what was left, found all files whole, and answered right")


if __name__ == "__main__":
    typer.run(main)
