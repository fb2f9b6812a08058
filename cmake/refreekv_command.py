"""The program `refreekv`: Ctrl-C ends it without a traceback, also while it still imports the package."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from refreekv_cpp.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()
