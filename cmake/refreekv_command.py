"""The program `refreekv`: Ctrl-C ends it without a traceback, also while it still imports the package."""

from __future__ import annotations

import os
import sys


def main() -> None:
    os.environ.pop(
        "REFREEKV_POLICY", None
    )  # it is for programs that choose no policy themselves; commands have an option
    try:
        from refreekv_cpp.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()
