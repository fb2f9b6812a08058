"""Decoding while the cold store's file is in the page cache, and after its pages were dropped from it (Linux).

    python tests/tools/dropped_pages.py MODEL [--tokens 7168] [--rounds 5] [--threads 2]

Rounds of 48 tokens alternate. It prints the medians in milliseconds, their ratio, and what the last round of each read.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from refreekv_cpp import Llama

N_TOKENS = 48


def drop_pages(folder: str) -> None:
    """Of the open files in this folder, which have no name any more."""
    for fd in Path("/proc/self/fd").iterdir():
        if os.path.exists(fd) and os.readlink(fd).startswith(folder):
            os.fsync(int(fd.name))
            os.posix_fadvise(int(fd.name), 0, 0, os.POSIX_FADV_DONTNEED)


def main(
    model: Path,
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 7168,
    rounds: Annotated[int, typer.Option(help="Of either kind.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    # not the folder of temporary files, which may be memory
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
        llm = Llama(
            str(model),
            n_ctx=tokens + 256,
            kv_policy="refreekv",
            kv_cold="file",
            kv_cold_dir=folder,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        text = b" ".join(str(i * 7919 % 10007).encode() for i in range(tokens))
        llm.eval(llm.tokenize(text)[:tokens])
        llm.prune_kv()
        times: dict[str, list[float]] = {"in the page cache": [], "dropped": []}
        rows = dict.fromkeys(times, (0, 0))
        for _ in range(rounds):
            for name, seconds in times.items():
                llm.n_tokens = tokens
                if name == "dropped":
                    drop_pages(folder)
                before = llm.kv_stats
                for _ in range(N_TOKENS):
                    start = time.perf_counter()
                    token = llm.sample(temp=0.0)
                    llm.eval([token])
                    seconds.append(time.perf_counter() - start)
                after = llm.kv_stats
                rows[name] = (after.n_rows_read - before.n_rows_read, after.n_rows_left - before.n_rows_left)
        medians = {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}
        means = {name: 1000 * statistics.mean(seconds) for name, seconds in times.items()}
        for name, median in medians.items():
            n_read, n_left = rows[name]
            print(f"{name}: {median:.2f} ms a token (mean {means[name]:.2f}), {n_read} rows read, {n_left} left")
        print(f"ratio: {medians['dropped'] / medians['in the page cache']:.3f} (of means: ", end="")
        print(f"{means['dropped'] / means['in the page cache']:.3f})")


if __name__ == "__main__":
    typer.run(main)
