"""`python -m refreekv_cpp.auto [options] script.py args...`: runs a program that uses llama_cpp, with a KV policy.

The program is unchanged: its `llama_cpp.Llama` is `refreekv_cpp.Llama` (see `refreekv_cpp.dropin`).
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from refreekv_cpp import dropin
from refreekv_cpp.errors import PolicyError
from refreekv_cpp.options import HELP, VARIABLES


def main(argv: Sequence[str]) -> None:
    """Run what the arguments say as `__main__`. Options end where the program's name begins, as for `python` itself."""
    arguments = _parser().parse_args(argv)
    try:
        _ask(arguments)
        if not arguments.module and not Path(arguments.program).exists():
            raise FileNotFoundError(f"{arguments.program}: no such file")
    except (PolicyError, OSError) as error:
        raise SystemExit(f"refreekv: {error}") from None

    sys.argv = [arguments.program, *arguments.args]
    if arguments.module:
        runpy.run_module(arguments.program, run_name="__main__", alter_sys=True)
    else:
        if not getattr(sys.flags, "safe_path", False):
            sys.path[0] = str(Path(arguments.program).resolve().parent)
        runpy.run_path(arguments.program, run_name="__main__")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m refreekv_cpp.auto",
        description="Run a program that uses llama_cpp.Llama with a KV policy.",
        allow_abbrev=False,
    )
    for name, variable in VARIABLES.items():
        other = ", else refreekv" if name == "kv_policy" else ""
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{HELP[name]} Default: {variable}{other}.")
    parser.add_argument("-m", dest="module", action="store_true", help="the program is a module")
    parser.add_argument("program", help="a script, or after -m a module")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="of the program")
    return parser


def _ask(arguments: argparse.Namespace) -> None:
    """Through the environment, so that processes that the program starts and that import refreekv_cpp follow."""
    asked = {variable: getattr(arguments, name) for name, variable in VARIABLES.items()}
    os.environ.update({variable: value for variable, value in asked.items() if value})
    if not os.environ.get(VARIABLES["kv_policy"]):
        os.environ[VARIABLES["kv_policy"]] = "refreekv"
    dropin.install_if_asked()


if __name__ == "__main__":
    main(sys.argv[1:])
