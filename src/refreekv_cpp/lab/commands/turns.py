from __future__ import annotations

import statistics
from contextlib import closing
from typing import Annotated, Any, get_args

import typer
from rich.progress import track
from rich.table import Table

from refreekv_cpp._units import mebibytes
from refreekv_cpp.cli import common
from refreekv_cpp.cli.common import ModelArgument
from refreekv_cpp.cli.options import MachineOptions, takes_options
from refreekv_cpp.lab.bench.turns import Conversation, Turn
from refreekv_cpp.models import resolve
from refreekv_cpp.options import Evicted
from refreekv_cpp.policies import as_policy

_FULL = "full"


@common.user_errors()
@takes_options
def turns(
    model: ModelArgument,
    options: MachineOptions,
    kv_policy: Annotated[str, typer.Option(help="The policy of the pruned caches.")] = "refreekv",
    kv_evicted: Annotated[
        str,
        typer.Option(help="What becomes of what was evicted when a question follows, by commas."),
    ] = "keep,restore",
    tokens: Annotated[int, typer.Option(min=100, help="Length of the document.")] = 6000,
    n_turns: Annotated[int, typer.Option("--turns", min=1, max=12, help="Questions.")] = 10,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to answer with at most.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the document and the questions.")] = 0,
) -> None:
    names = [_FULL, *(name.strip() for name in kv_evicted.split(","))]
    for name in names[1:]:
        if name not in get_args(Evicted):
            raise ValueError(f"--kv-evicted {name}: must be one of {', '.join(get_args(Evicted))}")
    as_policy(kv_policy)
    options.refuse("kv_elastic")
    path = resolve(model)
    with common.vocabulary(path) as vocabulary:
        common.check_length("--tokens", tokens, vocabulary)
    n_ctx = tokens + 400 + n_turns * (max_tokens + 200)
    # the layers that fit with the full cache fit with the others, too
    shared = options.llama_options(path, n_ctx=n_ctx, kv_policy=_FULL, kv_elastic=True)
    held: dict[str, list[Turn]] = {}
    for name in names:
        kv: dict[str, Any] = {}
        if name != _FULL:
            kv = {"kv_evicted": name, "kv_policy": kv_policy}
        with closing(common.load(path, {**shared, **kv})) as llm:
            conversation = Conversation.make(llm, n_tokens=tokens, n_turns=n_turns, seed=seed)
            held[name] = list(
                track(
                    conversation.hold(llm, max_tokens=max_tokens),
                    name,
                    total=n_turns,
                    console=common.stderr,
                    transient=True,
                )
            )
    common.print_tables(_by_turn(held), _summary(held))


def _by_turn(held: dict[str, list[Turn]]) -> Table:
    table = Table("turn", *(f"{name}: {what}" for name in held for what in ("first token, s", "KV", "fact")))
    for i in range(len(held[_FULL])):
        cells = []
        for name, done in held.items():
            same = "" if name == _FULL or done[i].answer == held[_FULL][i].answer else ", other words"
            cells += [
                f"{done[i].first_token:.2f}",
                mebibytes(done[i].bytes),
                ("found" if done[i].found else "missed") + same,
            ]
        table.add_row(str(i + 1), *cells)
    return table


def _summary(held: dict[str, list[Turn]]) -> Table:
    """Medians over the turns after the first."""
    table = Table(
        "cache", "facts", "answers as full's", "first token, s", "of full's", "KV after a turn", "cold", "restore, ms"
    )
    full = held[_FULL]

    def first_token(done: list[Turn]) -> float:
        return statistics.median(turn.first_token for turn in done[1:] or done)

    for name, done in held.items():
        table.add_row(
            name,
            f"{sum(turn.found for turn in done)} of {len(done)}",
            f"{sum(a.answer == b.answer for a, b in zip(done, full, strict=True))} of {len(done)}",
            f"{first_token(done):.2f}",
            f"{first_token(done) / first_token(full):.2f}",
            mebibytes(statistics.median(turn.bytes for turn in done)),
            mebibytes(statistics.median(turn.bytes_cold for turn in done)),
            f"{statistics.median(turn.restore for turn in done[1:] or done) * 1000:.0f}",
        )
    return table
