from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from refreekv_cpp._units import parse_bytes
from refreekv_cpp.cli import common
from refreekv_cpp.cli.common import MemoryLimitOption, ModelArgument
from refreekv_cpp.cli.options import MachineOptions, takes_options
from refreekv_cpp.lab.eval.data import Item, draw, of_datasets, read_items
from refreekv_cpp.lab.eval.generators import GENERATORS, check_names, generate
from refreekv_cpp.lab.eval.plots import write_plots
from refreekv_cpp.lab.eval.prompts import Prompter
from refreekv_cpp.lab.eval.report import REPORT, write_report
from refreekv_cpp.lab.eval.runner import Run, Task
from refreekv_cpp.lab.eval.spec import parse_specs
from refreekv_cpp.lab.eval.turn import Mode, Settings
from refreekv_cpp.lab.figure import have_matplotlib
from refreekv_cpp.models import resolve

_MODES: dict[str, list[Mode]] = {"seen": ["seen"], "hidden": ["hidden"], "both": ["seen", "hidden"]}


@common.user_errors()
@takes_options
def evaluate(
    model: ModelArgument,
    machine: MachineOptions,
    out: Annotated[Path, typer.Option(help="Folder of the run: records and report. An existing run is resumed.")],
    policies: Annotated[
        str,
        typer.Option(
            help="Caches, separated by commas: a policy, its parameters after colons, a cache type after @. "
            "The full cache, which all are compared with, is always one of them."
        ),
    ] = "full,refreekv,streaming:budget=0.4,full@q8_0",
    data: Annotated[Path | None, typer.Option(help="Folder of *.jsonl with items (docs/how-to/evaluate.md).")] = None,
    datasets: Annotated[str, typer.Option(help="Only these of them, separated by commas.", show_default="all")] = "",
    items: Annotated[int, typer.Option(min=1, help="Items of each dataset at most, drawn by the seed.")] = 10,
    generators: Annotated[
        str | None,
        typer.Option(
            "--generate", help=f"Made-up items: {', '.join(GENERATORS)}.", show_default="without --data: all of them"
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of made-up contexts, separated by commas.")] = "1024,2048",
    depths: Annotated[str, typer.Option(help="Where the fact is, 0 (first) to 1 (last).")] = "0.1,0.5,0.9",
    question: Annotated[str, typer.Option(help="seen: read before the pruning; hidden: after it; or both.")] = "both",
    min_tokens: Annotated[int, typer.Option(min=0, help="Leave shorter prompts out.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Leave longer prompts out.")] = 4096,
    continuation: Annotated[int, typer.Option(min=2, help="Tokens of an answer at most; so many are compared.")] = 128,
    kv_memory_limit: MemoryLimitOption = None,
    template: Annotated[bool, typer.Option(help="Use the model's chat template for questions.")] = True,
    flash_attn: Annotated[bool, typer.Option(help="Use flash attention for caches that do not need it.")] = False,
    same_kernel: Annotated[
        bool,
        typer.Option(
            help="Have the kernel of pruned caches attend to the full cache too, so that its rounding is theirs."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of what is drawn: items, made-up texts, intervals.")] = 0,
) -> None:
    specs = parse_specs(policies, same_kernel=same_kernel)
    if question not in _MODES:
        raise ValueError(f"--question {question}: must be one of {', '.join(_MODES)}")
    names = list(GENERATORS) if generators is None and data is None else _names(generators or "")
    check_names(names)
    sizes = [int(_number(text, "--lengths", 16, 2**20)) for text in _names(lengths)]
    places = [_number(text, "--depths", 0, 1) for text in _names(depths)]
    machine.refuse("kv_elastic", "type_k", "type_v")
    path = resolve(model)
    written = of_datasets(read_items(data), _names(datasets)) if data else []

    with common.vocabulary(path) as vocabulary:
        for size in sizes:
            common.check_length("--lengths", size, vocabulary)
        prompter = Prompter(vocabulary, template=template)

        def fits(item: Item) -> bool:
            return min_tokens <= prompter.prompt(item).n_tokens <= max_tokens

        made_up = generate(names, sizes, places, prompter.count, seed=seed)
        chosen = [*draw(list(filter(fits, written)), items, seed=seed), *filter(fits, made_up)]
        tasks = [Task(item, prompter.prompt(item)) for item in chosen]
        if not tasks:
            raise ValueError(f"none of {len(written) + len(made_up)} items has {min_tokens} to {max_tokens} tokens")
    settings = Settings(
        n_continuation=continuation,
        n_threads=machine.threads,
        flash_attn=flash_attn,
        n_gpu_layers=machine.n_gpu_layers(path, n_ctx=max_tokens + continuation, kv_policy="full"),
        kv_memory_limit=None if kv_memory_limit is None else parse_bytes(kv_memory_limit, option="--kv-memory-limit"),
        options=machine.others,
        same_kernel=same_kernel,
        template=template,
        seed=seed,
    )
    run = Run(out, path, tasks, specs, _MODES[question], settings)
    common.print_note(f"{len(tasks)} items, {len(specs)} caches; {run.n_done} records are there, {len(run.jobs)} to do")
    _go(run)
    _report(out)


@common.user_errors()
def eval_report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What was --out of refreekv eval.")],
) -> None:
    _report(folder)


def _go(run: Run) -> None:
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=common.stderr, transient=True) as progress:
        bar = progress.add_task("", total=run.n_done + len(run.jobs), completed=run.n_done)
        run.go(
            lambda what: progress.update(bar, description=what),
            lambda job: progress.advance(bar),
        )


def _report(folder: Path) -> None:
    print(write_report(folder))
    paths = [folder / REPORT, *(write_plots(folder) if have_matplotlib() else [])]
    common.print_note("written: " + ", ".join(map(str, paths)))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _number(text: str, option: str, low: float, high: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not low <= number <= high:
        raise ValueError(f"{option} {text}: must be a number from {low} to {high}")
    return number
