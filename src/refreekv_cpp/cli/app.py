"""The commands, one file each. What an extra brings they import when they run, so that all of them start without."""

from __future__ import annotations

import re
from typing import Annotated

import llama_cpp
import typer

import refreekv_cpp
from refreekv_cpp.cli import common
from refreekv_cpp.cli.bench import bench
from refreekv_cpp.cli.chat import chat
from refreekv_cpp.cli.demo import demo
from refreekv_cpp.cli.eval import eval_report, evaluate
from refreekv_cpp.cli.info import info
from refreekv_cpp.cli.memory import memory
from refreekv_cpp.cli.plan import plan
from refreekv_cpp.cli.run import run
from refreekv_cpp.cli.serve import serve
from refreekv_cpp.cli.turns import turns

app = typer.Typer(
    help="llama.cpp with a KV cache that keeps what the model still looks at, and gives the rest back.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.command(context_settings={"allow_extra_args": True})(run)  # it says how to write a prompt
for command in (chat, demo, info, plan, bench, memory, turns):
    app.command()(command)
app.command("eval")(evaluate)
app.command("eval-report")(eval_report)
# its options are those of upstream's server, which parses them
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)


def _print_version(asked: bool) -> None:
    if asked:
        print(version())
        raise typer.Exit


@app.callback()
def _all_commands(
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what llama.cpp and this package log.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the versions and backends, and exit."
        ),
    ] = False,
) -> None:
    common.messages_log.install(verbose=verbose)


def version() -> str:
    """Of the package, of the llama-cpp-python in it, and the backends that its llama.cpp was built with."""
    llama_cpp.llama_backend_init()
    # "CPU : AVX = 1 | AVX2 = 1 | CUDA : ARCHS = 900 | ..."
    backends = re.findall(r"(?:^|\| )(\S+) : ", llama_cpp.llama_print_system_info().decode())
    return (
        f"refreekv-cpp {refreekv_cpp.__version__}\n"
        f"llama-cpp-python {llama_cpp.__version__}\n"
        f"backends of llama.cpp: {', '.join(dict.fromkeys(backends))}"
    )


def main() -> None:
    common.accept_any_text()
    app(prog_name="refreekv")
