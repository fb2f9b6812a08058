"""What a bound on the error of each head costs: decoding with `ReFreeKV(max_error=...)`.

    python tests/tools/max_error.py MODEL TEXT [--tokens 4096] [--answer 32] [--threads 2]

The first tokens of the file TEXT are the prompt; those that follow are decoded. Prints for each bound the largest error
that was certified, the part of attention that codes stood for, the rows that a token reads, and its time (median).
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated

import typer

from refreekv_cpp import Llama, ReFreeKV

BOUNDS = (0.0, 0.5, 0.2, 0.1, 0.05)


def main(
    model: Path,
    text: Path,
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 4096,
    answer: Annotated[int, typer.Option(help="Tokens that are decoded.")] = 32,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    state = None
    for bound in BOUNDS:
        llm = Llama(
            str(model),
            n_ctx=tokens + answer,
            kv_policy=ReFreeKV(max_error=bound),
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        read = llm.tokenize(text.read_bytes())[: tokens + answer]
        if state is None:
            llm.eval(read[:tokens])
            llm.prune_kv()
            state = llm.save_state()
        else:
            llm.load_state(state)
        rows, seconds = llm.kv_stats.n_rows_read, []
        for token in read[tokens:]:
            start = time.perf_counter()
            llm.eval([token])
            seconds.append(time.perf_counter() - start)
        stats = llm.kv_stats
        print(
            f"max_error={bound}: certified {stats.error_bound:.3f}, by codes {stats.by_codes:.1%}, "
            f"{(stats.n_rows_read - rows) / answer:.0f} rows and {1000 * statistics.median(seconds):.1f} ms a token"
        )
        llm.close()


if __name__ == "__main__":
    typer.run(main)
