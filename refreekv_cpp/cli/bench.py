from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from refreekv_cpp._units import mebibytes
from refreekv_cpp.bench.bound import read_bandwidth, weight_bytes
from refreekv_cpp.bench.runner import Contestant, Result, run
from refreekv_cpp.cli import common
from refreekv_cpp.cli.common import ModelArgument
from refreekv_cpp.document import write_document
from refreekv_cpp.policies import as_policy

import llama_cpp  # isort: skip  (after refreekv_cpp, which has loaded our library)
from llama_cpp._utils import suppress_stdout_stderr  # isort: skip


@common.user_errors()
def bench(
    model: ModelArgument,
    against: Annotated[
        Path | None, typer.Option(help="Folder of a stock libllama (cmake -DREFREEKV_STOCK=ON) to compare with.")
    ] = None,
    kv_policy: Annotated[
        str, typer.Option(help="Policies, separated by commas; elastic is the full cache with kv_elastic.")
    ] = "full,refreekv",
    tokens: Annotated[str, typer.Option(help="Prompt lengths, separated by commas.")] = "512,2048",
    flash_attn: Annotated[str, typer.Option(help="off, on, or both.")] = "both",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Bursts of decoding per contestant.")] = 8,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
) -> None:
    """Speed and memory, stock and policies side by side, their decoding interleaved."""
    common.check_file(model)
    settings = {"off": [False], "on": [True], "both": [False, True]}.get(flash_attn)
    if settings is None:
        raise ValueError(f"--flash-attn {flash_attn}: valid are off, on and both")
    lengths = [int(length) for length in tokens.split(",")]
    contestants = [c for setting in settings for c in contestants_of(kv_policy, against, flash_attn=setting)]

    text = document_tokens(model, max(lengths))
    results = []
    for length in lengths:
        common.stderr.print(f"{length} tokens ...", style="dim")
        # as little room as the run needs: stock allocates all of it
        n_ctx = -(-(length + 8 * rounds + 8) // 256) * 256
        results += run(contestants, model, text[:length], n_ctx=n_ctx, n_threads=threads, rounds=rounds)
        if json_path:
            json_path.write_text(json.dumps([result.as_dict() for result in results], indent=1))
    bandwidth, n_weights = read_bandwidth(threads), weight_bytes(model)
    common.print_tables(_table(results, n_weights, bandwidth))
    common.stderr.print(
        f"bound: {mebibytes(n_weights)} of weights and the cells kept, read once at {bandwidth / 1e9:.1f} GB/s",
        style="dim",
    )


def contestants_of(kv_policy: str, against: Path | None, *, flash_attn: bool) -> list[Contestant]:
    """Stock, when its library is given, then these policies (names separated by commas).

    Raises:
        ValueError: no such policy, or no library there.
    """
    if against and not any(against.glob("*llama.*")):
        raise ValueError(f"{against}: there is no libllama in it")
    names = kv_policy.split(",")
    for name in names:
        as_policy("full" if name == "elastic" else name)
    stock = [Contestant("stock", flash_attn, None, against)] if against else []
    return stock + [Contestant(name, flash_attn, name) for name in names]


def document_tokens(model: Path, n_tokens: int) -> list[int]:
    """The first tokens of a long document."""
    with suppress_stdout_stderr(disable=False):
        llm = llama_cpp.Llama(str(model), vocab_only=True, verbose=False)
    document = write_document(n_tokens + 64, lambda text: len(llm.tokenize(text.encode(), add_bos=False)))
    tokens: list[int] = llm.tokenize(document.encode())
    return tokens[:n_tokens]


def _table(results: list[Result], n_weights: int, bandwidth: float) -> Table:
    table = Table()
    for column in (
        "tokens",
        "cache",
        "flash attn",
        "prefill t/s",
        "prune ms",
        "decode ms",
        "slowest",
        "ratio",
        "/ bound",
        "KV MiB",
        "kept",
        "RSS MiB",
    ):
        table.add_column(column, justify="left" if column in ("cache", "flash attn") else "right")
    for result in results:
        same = [other for other in results if other.n_tokens == result.n_tokens]
        # decode time over the faster setting of stock (of full, without stock)
        baseline = [r.decode_ms for r in same if r.contestant.name == same[0].contestant.name]
        kv = result.kv
        # stock says nothing of its cache, which is full's
        n_cells = kv["bytes_kept"] if kv else max((r.kv["bytes_full"] for r in same if r.kv), default=0)
        bound_ms = (n_weights + n_cells) / bandwidth * 1000
        table.add_row(
            str(result.n_tokens),
            result.contestant.name,
            "on" if result.contestant.flash_attn else "off",
            f"{result.n_tokens / result.prefill_s:.0f}",
            f"{result.prune_s * 1000:.0f}" if kv else "-",
            f"{result.decode_ms:.1f}",
            f"{max(result.decode_s) * 1000:.1f}",
            f"{result.decode_ms / min(baseline):.2f}",
            f"{result.decode_ms / bound_ms:.1f}",
            f"{kv['bytes'] / 2**20:.1f}" if kv else "-",
            f"{kv['budget']:.0%}" if kv else "-",
            f"{result.rss / 2**20:.0f}",
        )
    return table
