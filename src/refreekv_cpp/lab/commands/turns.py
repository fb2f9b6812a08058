from __future__ import annotations

import statistics
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.progress import track
from rich.table import Table

from refreekv_cpp._units import mebibytes
from refreekv_cpp.cli import common
from refreekv_cpp.cli.common import ModelArgument
from refreekv_cpp.cli.options import MachineOptions, takes_options
from refreekv_cpp.lab.bench.turns import Conversation, Turn
from refreekv_cpp.lab.eval.scores import bootstrap
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
    data: Annotated[
        Path | None, typer.Option(help="A *.jsonl of dialogues in place of a made-up one (docs/how-to/evaluate.md).")
    ] = None,
    tokens: Annotated[int, typer.Option(min=100, help="Length of a made-up document.")] = 6000,
    n_turns: Annotated[int, typer.Option("--turns", min=1, max=12, help="Questions of a made-up one.")] = 10,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to answer with at most.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the document and the questions.")] = 0,
) -> None:
    names = [_FULL, *(name.strip() for name in kv_evicted.split(","))]
    for name in names[1:]:
        if name not in get_args(Evicted):
            raise ValueError(f"--kv-evicted {name}: must be one of {', '.join(get_args(Evicted))}")
    as_policy(kv_policy)
    options.refuse("kv_elastic")
    dialogues = None if data is None else Conversation.read(data)
    path = resolve(model)
    with common.vocabulary(path) as vocabulary:
        if dialogues is not None:
            tokens = max(each.count(vocabulary) for each in dialogues)
            n_turns = max(len(each.questions) for each in dialogues)
        common.check_length("--tokens" if dialogues is None else "--data", tokens, vocabulary)
    n_ctx = tokens + 400 + n_turns * (max_tokens + 200)
    # the layers that fit with the full cache fit with the others, too
    shared = options.llama_options(path, n_ctx=n_ctx, kv_policy=_FULL, kv_elastic=True)
    held: dict[str, list[list[Turn]]] = {}
    for name in names:
        kv: dict[str, Any] = {}
        if name != _FULL:
            kv = {"kv_evicted": name, "kv_policy": kv_policy}
        with closing(common.load(path, {**shared, **kv})) as llm:
            made = dialogues or [Conversation.make(llm, n_tokens=tokens, n_turns=n_turns, seed=seed)]
            held[name] = [
                list(each.hold(llm, max_tokens=max_tokens))
                for each in track(made, name, console=common.stderr, transient=True)
            ]
    common.print_tables(_by_turn(held), _summary(held))


def _by_turn(held: dict[str, list[list[Turn]]]) -> Table:
    """Means over the conversations that have such a turn; times are medians."""
    what = ("first token, s", "KV", "score", "as full's")
    table = Table("turn", "conversations", *(f"{name}: {column}" for name in held for column in what))
    for i in range(max(map(len, held[_FULL]))):
        full = [turns[i] for turns in held[_FULL] if i < len(turns)]
        cells = []
        for turns in held.values():
            done = [each[i] for each in turns if i < len(each)]
            cells += [
                f"{statistics.median(turn.first_token for turn in done):.2f}",
                mebibytes(statistics.fmean(turn.bytes for turn in done)),
                f"{statistics.fmean(turn.score for turn in done):.2f}",
                _same(done, full),
            ]
        table.add_row(str(i + 1), str(len(full)), *cells)
    return table


def _summary(held: dict[str, list[list[Turn]]]) -> Table:
    """Scores with the 95 % interval of their difference from the full cache's; all else are medians over the turns
    after the first."""
    columns = ("score", "less full's", "answers as full's", "first token, s", "of full's", "KV after a turn", "cold")
    table = Table("cache", *columns, "restore, ms")
    full = [turn for turns in held[_FULL] for turn in turns]

    def later(turns: list[list[Turn]]) -> list[Turn]:
        return [turn for each in turns for turn in each[1:] or each]

    def first_token(turns: list[list[Turn]]) -> float:
        return statistics.median(turn.first_token for turn in later(turns))

    for name, turns in held.items():
        done = [turn for each in turns for turn in each]
        difference = bootstrap([a.score - b.score for a, b in zip(done, full, strict=True)])
        table.add_row(
            name,
            f"{statistics.fmean(turn.score for turn in done):.2f}",
            f"{difference.mean:+.2f} ({difference.low:+.2f} to {difference.high:+.2f})",
            _same(done, full),
            f"{first_token(turns):.2f}",
            f"{first_token(turns) / first_token(held[_FULL]):.2f}",
            mebibytes(statistics.median(turn.bytes for turn in later(turns))),
            mebibytes(statistics.median(turn.bytes_cold for turn in later(turns))),
            f"{statistics.median(turn.restore for turn in later(turns)) * 1000:.0f}",
        )
    return table


def _same(turns: list[Turn], full: list[Turn]) -> str:
    return f"{sum(a.answer == b.answer for a, b in zip(turns, full, strict=True))} of {len(turns)}"
