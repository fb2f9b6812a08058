"""The commands, one file each."""

from __future__ import annotations

import typer

from refreekv_cpp.cli.bench import bench
from refreekv_cpp.cli.chat import chat
from refreekv_cpp.cli.demo import demo
from refreekv_cpp.cli.eval import eval_report, evaluate
from refreekv_cpp.cli.evicted import evicted
from refreekv_cpp.cli.info import info
from refreekv_cpp.cli.memory import memory
from refreekv_cpp.cli.run import run
from refreekv_cpp.cli.serve import serve
from refreekv_cpp.cli.turns import turns

app = typer.Typer(
    help="llama.cpp with a KV cache that keeps what the model still looks at, and gives the rest back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for command in (run, chat, demo, info, bench, memory, turns):
    app.command()(command)
app.command("eval")(evaluate)
app.command("eval-report")(eval_report)
app.command("eval-evicted")(evicted)
# its options are those of upstream's server, which parses them
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)


def main() -> None:
    app()
