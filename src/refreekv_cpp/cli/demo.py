from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from refreekv_cpp import models
from refreekv_cpp._units import mebibytes
from refreekv_cpp.cli import common
from refreekv_cpp.cli.options import LoadOptions, takes_options
from refreekv_cpp.document import FACT, QUESTION, SECRET, write_document
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
@takes_options
def demo(
    options: LoadOptions,
    model: Annotated[str, typer.Option(metavar="MODEL", help=f"A chat model: {models.VALID}.")] = models.DEFAULT,
    tokens: Annotated[int, typer.Option(min=2000, help="Length of the document.")] = 4000,
) -> None:
    """Find a fact in a long document, with the full KV cache and with a pruned one, side by side."""
    path = models.resolve(model)
    with common.vocabulary(path) as vocabulary:
        common.check_length("--tokens", tokens, vocabulary)
    common.stderr.print(f"A document of {tokens} tokens says after a tenth of it: {FACT}\nQuestion: {QUESTION}")
    # the layers that fit with the full cache fit with the other, too
    full = options.llama_options(path, n_ctx=tokens + _ROOM, kv_policy="full", kv_memory_limit=None)
    pruned = {**full, "kv_policy": options.kv_policy, "kv_memory_limit": options.kv_memory_limit}
    results = {"full": _answer(path, "full", tokens, full)}
    results[options.kv_policy] = _answer(path, options.kv_policy, tokens, pruned)
    common.print_tables(_table(results))
    if len(results) > 1 and all(SECRET in result.answer for result in results.values()):
        common.print_note("Both caches found the fact.")


def _answer(path: Path, policy: str, tokens: int, options: dict[str, Any]) -> Result:
    common.print_note(f"{policy} ...")
    with closing(common.load(path, options)) as llm:
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
    table.add_row("memory of the cache", *(mebibytes(result.stats.bytes + result.stats.bytes_codes) for result in both))
    table.add_row("  of it exact", *(mebibytes(result.stats.bytes) for result in both))
    table.add_row("  of it compressed", *(mebibytes(result.stats.bytes_codes) for result in both))
    table.add_row("reading the document", *(f"{result.prefill_per_second:.0f} tokens/s" for result in both))
    table.add_row("compressing the cache", *(f"{result.stats.prune_ms:.0f} ms" for result in both))
    table.add_row("one token of the answer", *(f"{result.decode_ms:.1f} ms" for result in both))
    return table


def _marked(answer: str) -> Text:
    return Text(answer, style="green" if SECRET in answer else "red")
