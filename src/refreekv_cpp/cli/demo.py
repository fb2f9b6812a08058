from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from refreekv_cpp._units import mebibytes
from refreekv_cpp.cli import common
from refreekv_cpp.cli.common import FlashAttnOption, PolicyOption, ThreadsOption
from refreekv_cpp.default_model import default_model
from refreekv_cpp.document import FACT, QUESTION, SECRET, write_document
from refreekv_cpp.policies import as_policy
from refreekv_cpp.stats import KVStats

# for the question, the chat template and the answer
_ROOM = 256
_MAX_ANSWER = 48


@dataclass(frozen=True)
class Result:
    answer: str
    stats: KVStats
    prefill_per_second: float
    decode_ms: float


@common.user_errors()
def demo(
    model: Annotated[
        Path | None, typer.Option(help="A GGUF file of a chat model.", show_default="SmolLM2-135M-Instruct")
    ] = None,
    kv_policy: PolicyOption = "refreekv",
    tokens: Annotated[int, typer.Option(min=2000, help="Length of the document.")] = 4000,
    flash_attn: FlashAttnOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Find a fact in a long document, with the full KV cache and with a pruned one, side by side."""
    as_policy(kv_policy)
    path = model or default_model()
    common.stderr.print(
        f"A document of {tokens} tokens says after a tenth of it: {FACT}\nQuestion: {QUESTION}",
        highlight=False,
    )
    results = {
        policy: _answer(path, policy, tokens, flash_attn=flash_attn, threads=threads) for policy in ("full", kv_policy)
    }
    common.print_tables(_table(results))


def _answer(path: Path, policy: str, tokens: int, *, flash_attn: bool | None, threads: int | None) -> Result:
    common.stderr.print(f"{policy} ...", style="dim")
    with closing(
        common.load(path, n_ctx=tokens + _ROOM, kv_policy=policy, flash_attn=flash_attn, threads=threads)
    ) as llm:
        document = write_document(tokens, lambda text: len(llm.tokenize(text.encode(), add_bos=False)))
        messages = common.messages(None, f"{document}\n\n{QUESTION}")
        answer = "".join(common.stream_chat(llm, messages, max_tokens=_MAX_ANSWER, temperature=0)).strip()
        return Result(
            answer=answer,
            stats=llm.kv_stats,
            prefill_per_second=llm.prefill_tokens / llm.prefill_seconds,
            decode_ms=1000 * llm.decode_seconds / max(llm.decode_tokens, 1),
        )


def _table(results: dict[str, Result]) -> Table:
    table = Table()
    table.add_column("KV policy")
    for policy in results:
        table.add_column(policy)
    both = results.values()
    table.add_row("answer", *(_marked(result.answer) for result in both))
    table.add_row("KV memory", *(mebibytes(result.stats.bytes) for result in both))
    table.add_row("  of a full cache", *(mebibytes(result.stats.bytes_full) for result in both))
    table.add_row("budget (cells kept)", *(f"{result.stats.budget:.0%}" for result in both))
    table.add_row("prefill", *(f"{result.prefill_per_second:.0f} tokens/s" for result in both))
    table.add_row("pruning", *(f"{result.stats.prune_ms:.0f} ms" for result in both))
    table.add_row("decode", *(f"{result.decode_ms:.1f} ms per token" for result in both))
    return table


def _marked(answer: str) -> Text:
    return Text(answer, style="green" if SECRET in answer else "red")
