from __future__ import annotations

import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track
from rich.table import Table

from refreekv_cpp._units import mebibytes
from refreekv_cpp.bench.runner import Contestant, Worker
from refreekv_cpp.cli import common
from refreekv_cpp.cli.bench import contestants_of, document_tokens
from refreekv_cpp.cli.common import ModelArgument
from refreekv_cpp.cli.options import MachineOptions, takes_options
from refreekv_cpp.models import resolve

_TURN_TOKENS = 100


@common.user_errors()
@takes_options
def memory(
    model: ModelArgument,
    machine: MachineOptions,
    against: Annotated[Path | None, typer.Option(help="Folder of a stock libllama to compare with.")] = None,
    kv_policy: Annotated[str, typer.Option(help="Policies, separated by commas.")] = "refreekv",
    tokens: Annotated[int, typer.Option(min=512, help="Length of the long prompt.")] = 7000,
    n_ctx: Annotated[int, typer.Option(min=512, help="Tokens of context.")] = 8192,
    turns: Annotated[int, typer.Option(min=0, help="Turns of the chat.")] = 20,
    prompts: Annotated[int, typer.Option(min=0, help="Prompts of random length.")] = 200,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """What a process has in memory: after loading, with a long prompt, pruned; and after many conversations."""
    contestants = contestants_of(kv_policy, against, flash_attn=bool(machine.flash_attn))
    path = resolve(model)
    n_gpu_layers = machine.n_gpu_layers(path, n_ctx=n_ctx, kv_policy="full")
    text = document_tokens(path, tokens)
    stages = Table("cache", "stage", "RSS", "KV (allocator)", "RSS - KV", "kept cells need")
    growth = Table("cache", "tokens decoded", "ms/token", "slowest", "slowest / median")
    drift = Table("cache", "conversations", "RSS", "of it anonymous", "KV bytes after the same prompt")
    for contestant in contestants:
        contestant = replace(contestant, n_gpu_layers=n_gpu_layers, options=machine.others)
        common.stderr.print(f"{contestant.name} ...", style="dim")
        worker = Worker(contestant, path, n_ctx, threads)
        try:
            _stages(stages, worker, contestant, text)
            _growth(growth, worker, contestant)
            if contestant.kv_policy and prompts:
                _soak(drift, worker, contestant, text, turns=turns, prompts=prompts, n_ctx=n_ctx)
        finally:
            worker.close()
    common.print_tables(stages, growth, *([drift] if drift.row_count else []))


def _stages(table: Table, worker: Worker, contestant: Contestant, text: list[int]) -> None:
    loaded = worker.answer()
    answer = worker.ask(prefill=text)
    rows: list[tuple[str, int, dict[str, Any] | None]] = [
        ("loaded", loaded["rss"], loaded["kv"]),
        (f"{len(text)} tokens read", answer["rss_prompt"], answer["kv_prompt"]),
        ("pruned", answer["rss"], answer["kv"]),
    ]
    for stage, rss, kv in rows:
        if kv is None:
            if stage != "pruned":
                table.add_row(contestant.name, stage, mebibytes(rss), "-", "-", "-")
            continue
        table.add_row(
            contestant.name,
            stage,
            mebibytes(rss),
            mebibytes(kv["bytes"]),
            mebibytes(rss - kv["bytes"]),
            mebibytes(kv["bytes_kept"]),
        )


def _growth(table: Table, worker: Worker, contestant: Contestant) -> None:
    """Enough tokens that a growing cache takes a block more at least once."""
    n_tokens = 300
    seconds = worker.ask(decode=n_tokens)["decode_s"]
    median = statistics.median(seconds)
    table.add_row(
        contestant.name,
        str(n_tokens),
        f"{median * 1000:.1f}",
        f"{max(seconds) * 1000:.1f}",
        f"{max(seconds) / median:.2f}",
    )


def _soak(
    table: Table, worker: Worker, contestant: Contestant, text: list[int], *, turns: int, prompts: int, n_ctx: int
) -> None:
    """A chat, then prompts of random length; now and then the same short prompt, whose cache must not have grown."""
    rng = random.Random(0)
    same = text[:600]

    def look(stage: str) -> None:
        answer = worker.ask(prefill=same)
        rss = (mebibytes(answer[name]) for name in ("rss", "rss_anon"))
        table.add_row(contestant.name, stage, *rss, str(answer["kv"]["bytes"]))

    look("none yet")
    for _ in track(range(turns), "chat", console=common.stderr, transient=True):
        worker.ask(turn=text[:_TURN_TOKENS])
    look(f"a chat of {turns} turns")
    for i in track(range(1, prompts + 1), "prompts", console=common.stderr, transient=True):
        worker.ask(prefill=text[: rng.randint(16, min(len(text), n_ctx // 8))])
        worker.ask(decode=4)
        if i % 50 == 0:
            look(f"{i} prompts")
