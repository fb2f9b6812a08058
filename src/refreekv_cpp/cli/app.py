"""The commands, one file each. What an extra brings they import when they run, so that all of them start without.

Those of the laboratory are imported when one of them is called.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import llama_cpp
import typer
import typer.core

import refreekv_cpp
from refreekv_cpp.cli import common, library
from refreekv_cpp.cli.chat import chat
from refreekv_cpp.cli.demo import demo
from refreekv_cpp.cli.info import info
from refreekv_cpp.cli.plan import plan
from refreekv_cpp.cli.read import read
from refreekv_cpp.cli.run import run
from refreekv_cpp.cli.serve import ServeCommand, UiCommand, serve
from refreekv_cpp.lab import COMMANDS as LABORATORY


class LaterCommand(typer.core.TyperCommand):
    """A command of the laboratory, which `refreekv --help` lists, and which is imported when it is called."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """The context is that of the real command, which parses the arguments and runs."""
        from refreekv_cpp.lab.commands import app as laboratory

        commands: Any = typer.main.get_command(laboratory)
        return commands.commands[self.name].make_context(*args, **kwargs)


app = typer.Typer(
    help="llama.cpp with a KV cache that is small once the prompt has been read.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.command(context_settings={"allow_extra_args": True})(run)  # it says how to write a prompt
for command in (chat, read, demo, info, plan):
    app.command()(command)
app.add_typer(library.app, name="library")
# other options are those of llama-server, which parses them
_others = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(cls=ServeCommand, context_settings=_others)(serve)
app.command(
    "ui", cls=UiCommand, context_settings=_others, help="Serve a model, and open the page that shows the cache at work."
)(serve)
for name, text in LABORATORY.items():
    app.command(name, cls=LaterCommand, help=text, rich_help_panel="Laboratory")(lambda: None)


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
