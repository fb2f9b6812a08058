from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from refreekv_cpp._cache_types import CACHE_TYPES
from refreekv_cpp._extras import needs_extra
from refreekv_cpp._units import mebibytes
from refreekv_cpp.cli import common
from refreekv_cpp.cli.common import FixedThreadsOption, ModelArgument
from refreekv_cpp.cli.options import MachineOptions, takes_options
from refreekv_cpp.document import write_document
from refreekv_cpp.lab.bench.plot import write_plot
from refreekv_cpp.lab.bench.runner import BURST, Contestant, Result, run
from refreekv_cpp.models import resolve
from refreekv_cpp.policies import as_policy


@common.user_errors()
@takes_options
def bench(
    model: ModelArgument,
    machine: MachineOptions,
    against: Annotated[
        Path | None, typer.Option(help="Folder of a stock libllama (cmake -DREFREEKV_STOCK=ON) to compare with.")
    ] = None,
    kv_policy: Annotated[
        str,
        typer.Option(
            help="Policies, separated by commas; elastic is the full cache with kv_elastic, and @q8_0 behind a name is "
            "with K and V of that type."
        ),
    ] = "full,refreekv",
    tokens: Annotated[str, typer.Option(help="Prompt lengths, separated by commas.")] = "512,2048",
    flash_attn: Annotated[
        bool | None,
        typer.Option("--flash-attn/--no-flash-attn", help="Use flash attention.", show_default="one after the other"),
    ] = None,
    threads: FixedThreadsOption = 2,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Bursts of decoding per contestant.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="How often all of it is done, with new processes.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time per token there (needs matplotlib).")] = None,
) -> None:
    with needs_extra("lab", "refreekv bench"):
        from refreekv_cpp.lab.bench.bound import read_bandwidth, weight_bytes
    if plot:
        with needs_extra("lab", "--plot"):
            import matplotlib  # noqa: F401
    settings = [False, True] if flash_attn is None else [flash_attn]
    lengths = lengths_of(tokens)
    # as little room as the run needs: stock allocates all of it
    contexts = {length: -(-(length + room(rounds)) // 256) * 256 for length in lengths}
    machine.refuse("type_k", "type_v")
    contestants = [
        contestant for setting in settings for contestant in contestants_of(kv_policy, against, flash_attn=setting)
    ]
    path = resolve(model)
    text = document_tokens(path, max(lengths), "--tokens")
    n_gpu_layers = machine.n_gpu_layers(path, n_ctx=max(contexts.values()), kv_policy="full")
    contestants = [replace(each, n_gpu_layers=n_gpu_layers, options=machine.others) for each in contestants]
    bandwidth, n_weights = read_bandwidth(threads), weight_bytes(path)
    results = []
    for length in lengths:
        common.print_note(f"{length} tokens ...")
        results += run(
            contestants,
            path,
            text[:length],
            n_ctx=contexts[length],
            n_threads=threads,
            rounds=rounds,
            repeats=repeats,
        )
        if json_path:
            json_path.write_text(json.dumps([result.as_dict() for result in results], indent=1))

    def bound_ms(result: Result) -> float:
        return (n_weights + cell_bytes(result, results)) / bandwidth * 1000

    common.print_tables(_speed(results, bound_ms), _memory(results))
    for length in lengths:
        common.print_note(_faster(length, results))
    common.print_note(
        f"bound: {mebibytes(n_weights)} of weights, the cells kept and the codes, read once at "
        f"{bandwidth / 1e9:.1f} GB/s"
    )
    if plot:
        write_plot(plot, results, bound_ms)


def lengths_of(text: str) -> list[int]:
    """
    Raises:
        ValueError: no numbers of tokens, or one of them twice.
    """
    words = [word.strip() for word in text.split(",")]
    lengths = [int(word) if word.isdecimal() and len(word) < 10 else 0 for word in words]
    if min(lengths) < 1 or len(set(lengths)) < len(lengths):
        raise ValueError(f"--tokens {text}: must be different positive numbers below 10^9, separated by commas")
    return lengths


def contestants_of(kv_policy: str, against: Path | None, *, flash_attn: bool) -> list[Contestant]:
    """These policies (names separated by commas, with @TYPE behind them for K and V of another type than f16). When
    the folder of a stock library is given, stock comes first, once with each of these types.

    Raises:
        ValueError: no such policy or type, a type that needs flash attention, or no library there.
    """
    if against and not any(against.glob("*llama.*")):
        raise ValueError(f"{against}: there is no libllama in it")
    ours = []
    for text in kv_policy.split(","):
        name, at, cache_type = text.partition("@")
        as_policy("full" if name == "elastic" else name)
        if at and cache_type not in CACHE_TYPES:
            raise ValueError(f"{text}: the type must be one of {', '.join(CACHE_TYPES)}")
        if at and not flash_attn and cache_type not in ("f32", "f16", "bf16"):
            raise ValueError(f"{text}: quantised values need --flash-attn")
        ours.append(Contestant(text, flash_attn, name, cache_type=cache_type or "f16"))
    types = dict.fromkeys(contestant.cache_type for contestant in ours) if against else {}
    stock = [
        Contestant(f"stock@{kind}" if kind != "f16" else "stock", flash_attn, None, against, cache_type=kind)
        for kind in types
    ]
    return stock + ours


def room(rounds: int) -> int:
    """Tokens of context that `rounds` bursts of decoding need beside a prompt."""
    return BURST * rounds + 8


def document_tokens(model: Path, n_tokens: int, option: str) -> list[int]:
    """The first tokens of a long document.

    Raises:
        ValueError: the model was not made for so many, which `option` asks for.
    """
    with common.vocabulary(model) as llm:
        common.check_length(option, n_tokens, llm)
        document = write_document(n_tokens + 64, lambda text: len(llm.tokenize(text.encode(), add_bos=False)))
        tokens: list[int] = llm.tokenize(document.encode())
    return tokens[:n_tokens]


def cell_bytes(result: Result, results: list[Result]) -> int:
    """Bytes that a step reads: the kept cells, and the codes of evicted ones. Stock reads as many as `full`."""
    if result.kv:
        return int(result.kv["bytes_kept"] + result.kv["bytes_codes"])
    cache_type = result.contestant.cache_type
    same = [r for r in results if r.n_tokens == result.n_tokens and r.contestant.cache_type == cache_type]
    return max((r.kv["bytes_full"] for r in same if r.kv), default=0)


def _baseline(result: Result, results: list[Result]) -> list[Result]:
    """The settings of stock at this length; without stock, of what was named first."""
    same = [other for other in results if other.n_tokens == result.n_tokens]
    return [other for other in same if other.contestant.name == same[0].contestant.name]


def _faster(length: int, results: list[Result]) -> str:
    baseline = _baseline(next(result for result in results if result.n_tokens == length), results)
    name = baseline[0].contestant.name
    if len(baseline) == 1:
        return f"{length} tokens: ratios are to {name}"
    reads = min(baseline, key=lambda r: sum(r.read_s)).contestant
    decodes = min(baseline, key=lambda r: r.decode_ms).contestant
    return (
        f"{length} tokens: {name} reads faster with flash attention {_on(reads)}, decodes faster with it "
        f"{_on(decodes)}; ratios are to these"
    )


def _on(contestant: Contestant) -> str:
    return "on" if contestant.flash_attn else "off"


def _new_table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column in ("cache", "flash attn") else "right")
    return table


def _cells(result: Result) -> list[str]:
    return [str(result.n_tokens), result.contestant.name, _on(result.contestant)]


def _speed(results: list[Result], bound_ms: Callable[[Result], float]) -> Table:
    reading, decoding = ("prefill t/s", "time"), ("decode ms", "quartiles", "time", "/ bound", "graphs reused")
    table = _new_table("tokens", "cache", "flash attn", *reading, "prune ms", "in steps", *decoding)
    for result in results:
        baseline = _baseline(result, results)
        reads, decodes = min(baseline, key=lambda r: sum(r.read_s)), min(baseline, key=lambda r: r.decode_ms)
        prune_ms = statistics.median(result.prune_s) * 1000
        low, high = result.decode_quartiles_ms
        table.add_row(
            *_cells(result),
            f"{result.tokens_per_second:.0f}",
            f"× {result.read_ratio(reads):.3f}",
            f"{prune_ms:.0f}",
            f"{prune_ms / decodes.decode_ms:.1f}",
            f"{result.decode_ms:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"× {result.decode_ms / decodes.decode_ms:.3f}",
            f"{result.decode_ms / bound_ms(result):.1f}",
            f"{result.n_reused / result.n_decoded:.0%}",
        )
    return table


def _memory(results: list[Result]) -> Table:
    table = _new_table("tokens", "cache", "flash attn", "load s", "KV and codes", "of full", "resident", "at most")
    for result in results:
        kv: dict[str, Any] | None = result.kv
        table.add_row(
            *_cells(result),
            f"{statistics.median(result.load_s):.2f}",
            mebibytes(kv["bytes"] + kv["bytes_codes"]) if kv else "-",
            f"{cell_bytes(result, results) / kv['bytes_full']:.1%}" if kv else "-",
            mebibytes(result.rss),
            mebibytes(result.rss_peak),
        )
    return table
