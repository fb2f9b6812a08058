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
from refreekv_cpp._options import EVICTED_VARIABLE, MEMORY_LIMIT_VARIABLE, POLICY_VARIABLE
from refreekv_cpp.errors import PolicyError


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
    parser.add_argument("--kv-policy", metavar="NAME", help=f"default: {POLICY_VARIABLE}, else refreekv")
    parser.add_argument("--kv-evicted", metavar="WHAT", help=f"restore, recompute or drop; default: {EVICTED_VARIABLE}")
    parser.add_argument("--kv-memory-limit", metavar="SIZE", help=f"such as 512MiB; default: {MEMORY_LIMIT_VARIABLE}")
    parser.add_argument("-m", dest="module", action="store_true", help="the program is a module")
    parser.add_argument("program", help="a script, or after -m a module")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="of the program")
    return parser


def _ask(arguments: argparse.Namespace) -> None:
    """Through the environment, so that processes that the program starts and that import refreekv_cpp follow."""
    options = {
        POLICY_VARIABLE: arguments.kv_policy or os.environ.get(POLICY_VARIABLE) or "refreekv",
        EVICTED_VARIABLE: arguments.kv_evicted,
        MEMORY_LIMIT_VARIABLE: arguments.kv_memory_limit,
    }
    os.environ.update({name: value for name, value in options.items() if value})
    dropin.install_if_asked()


if __name__ == "__main__":
    main(sys.argv[1:])
