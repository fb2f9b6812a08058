"""The laboratory's commands, one file each. `refreekv_cpp.cli` imports this module when one of them is called."""

from __future__ import annotations

import typer

from refreekv_cpp.lab import COMMANDS
from refreekv_cpp.lab.commands.bench import bench
from refreekv_cpp.lab.commands.eval import eval_report, evaluate
from refreekv_cpp.lab.commands.memory import memory
from refreekv_cpp.lab.commands.turns import turns

_FUNCTIONS = {"bench": bench, "memory": memory, "turns": turns, "eval": evaluate, "eval-report": eval_report}

app = typer.Typer()
for name, text in COMMANDS.items():
    app.command(name, help=text)(_FUNCTIONS[name])
