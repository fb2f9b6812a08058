from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track
from rich.table import Table

from refreekv_cpp import fit
from refreekv_cpp._units import mebibytes
from refreekv_cpp.cli import common
from refreekv_cpp.cli.common import FixedThreadsOption, ModelArgument
from refreekv_cpp.cli.options import MachineOptions, takes_options
from refreekv_cpp.lab.bench.runner import Contestant, Result, Worker, run
from refreekv_cpp.lab.commands.bench import contestants_of, document_tokens, room
from refreekv_cpp.models import resolve

_ROUNDS = 8
_TURNS = 20
_TURN_TOKENS = 100


@common.user_errors()
@takes_options
def memory(
    model: ModelArgument,
    machine: MachineOptions,
    against: Annotated[
        Path | None, typer.Option(help="Folder of a stock libllama (cmake -DREFREEKV_STOCK=ON) to compare with.")
    ] = None,
    kv_policy: Annotated[
        str, typer.Option(help="Policies, separated by commas; @q8_0 behind one is with K and V of that type.")
    ] = "refreekv,refreekv@q8_0",
    tokens: Annotated[int, typer.Option(min=512, help="Length of the prompt.")] = 7000,
    n_ctx: Annotated[int, typer.Option(min=512, help="Tokens of context.")] = 8192,
    prompts: Annotated[int, typer.Option(min=0, help="Then read so many prompts of random length in one process.")] = 0,
    threads: FixedThreadsOption = 2,
) -> None:
    contestants = contestants_of(kv_policy, against, flash_attn=True)
    machine.refuse("type_k", "type_v")
    if tokens + room(_ROUNDS) > n_ctx:
        raise ValueError(f"--tokens {tokens}: must be at most {n_ctx - room(_ROUNDS)} with --n-ctx {n_ctx}")
    fit.check_n_ctx(n_ctx)
    path = resolve(model)
    text = document_tokens(path, tokens, "--tokens")
    n_gpu_layers = machine.n_gpu_layers(path, n_ctx=n_ctx, kv_policy="full")
    contestants = [replace(each, n_gpu_layers=n_gpu_layers, options=machine.others) for each in contestants]
    common.print_note(f"{len(text)} tokens, n_ctx {n_ctx} ...")
    results = run(contestants, path, text, n_ctx=n_ctx, n_threads=threads, rounds=_ROUNDS)
    common.print_tables(_processes(results))
    if prompts:
        drift = Table("cache", "conversations", "RSS", "of it anonymous", "KV bytes after the same prompt")
        for contestant in contestants:
            if contestant.kv_policy:
                worker = Worker(contestant, path, n_ctx, threads)
                try:
                    worker.answer()
                    _soak(drift, worker, contestant, text, prompts=prompts, n_ctx=n_ctx)
                finally:
                    worker.close()
        common.print_tables(drift)


def _processes(results: list[Result]) -> Table:
    """`peak` is over the whole life of a process; `settled` is after the last token, with the prompt pruned."""
    table = Table("cache")
    for column in ("loaded", "peak", "settled", "peak, ratio", "settled, ratio", "KV", "decode ms", "ratio"):
        table.add_column(column, justify="right")
    first = results[0]
    for result in results:
        table.add_row(
            result.contestant.name,
            mebibytes(result.rss_loaded),
            mebibytes(result.rss_peak),
            mebibytes(result.rss),
            f"× {result.rss_peak / first.rss_peak:.3f}",
            f"× {result.rss / first.rss:.3f}",
            mebibytes(result.kv["bytes"]) if result.kv else "-",
            f"{result.decode_ms:.1f}",
            f"× {result.decode_ms / first.decode_ms:.3f}",
        )
    return table


def _soak(table: Table, worker: Worker, contestant: Contestant, text: list[int], *, prompts: int, n_ctx: int) -> None:
    """A chat, then prompts of random length; now and then the same short prompt, whose cache must not have grown."""
    rng = random.Random(0)
    same = text[:600]

    def look(stage: str) -> None:
        answer = worker.ask(prefill=same)
        rss = (mebibytes(answer[name]) for name in ("rss", "rss_anon"))
        table.add_row(contestant.name, stage, *rss, str(answer["kv"]["bytes"]))

    look("none yet")
    for _ in track(range(_TURNS), "chat", console=common.stderr, transient=True):
        worker.ask(turn=text[:_TURN_TOKENS])
    look(f"a chat of {_TURNS} turns")
    for i in track(range(1, prompts + 1), "prompts", console=common.stderr, transient=True):
        worker.ask(prefill=text[: rng.randint(16, min(len(text), n_ctx // 8))])
        worker.ask(decode=4)
        if i % 50 == 0:
            look(f"{i} prompts")
