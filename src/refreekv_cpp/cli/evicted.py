from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from refreekv_cpp._files import check_file
from refreekv_cpp.cli import common
from refreekv_cpp.cli.common import FixedThreadsOption, ModelArgument
from refreekv_cpp.cli.options import MachineOptions, takes_options
from refreekv_cpp.eval.evicted import rank_correlation, study
from refreekv_cpp.models import resolve
from refreekv_cpp.policies import as_policy


@common.user_errors()
@takes_options
def evicted(
    model: ModelArgument,
    machine: MachineOptions,
    text: Annotated[Path, typer.Option(help="A text; its beginning is the prompt.")],
    kv_policy: Annotated[str, typer.Option(help="A policy that looks at attention.")] = "refreekv",
    tokens: Annotated[int, typer.Option(min=512, help="Length of the prompt.")] = 4096,
    answer: Annotated[int, typer.Option(min=2, help="Tokens of the answer.")] = 48,
    threads: FixedThreadsOption = 2,
) -> None:
    """What evicted cells would have drawn of an answer's attention, and whether that says how far the answer is off."""
    check_file(text)
    policy = as_policy(kv_policy)
    path = resolve(model)
    with common.vocabulary(path) as vocabulary:
        common.check_length("--tokens", tokens, vocabulary)
        prompt = vocabulary.tokenize(text.read_bytes())[:tokens]
    if len(prompt) < tokens:
        raise ValueError(f"{text}: {len(prompt)} tokens; --tokens {tokens} are wanted")
    options = machine.llama_options(path, n_ctx=tokens + answer + 8, kv_policy=policy)
    with closing(common.load(path, options)) as llm:
        result = study(llm, prompt, answer)
    table = Table("known of the evicted", "their part, mean", "wrong by, mean", "rank correlation with KL")
    truth = next(iter(result.mass.values()))
    for name, mass in result.mass.items():
        table.add_row(
            name,
            f"{mass.mean():.1%}",
            f"{np.abs(mass - truth).mean():.1%}",
            f"{rank_correlation(mass.mean(axis=1), result.kl):.2f}",
        )
    common.print_tables(table)
    common.print_note(
        f"{len(prompt)} tokens, {result.budget:.0%} kept; KL mean {result.kl.mean():.2g}, most {result.kl.max():.2g}"
    )
