"""The program `refreekv`: Ctrl-C ends it without a traceback, also while it still imports the package."""

from __future__ import annotations

import os
import sys


def main() -> None:
    # This variable is for programs that choose no policy themselves; the commands have an option.
    os.environ.pop("REFREEKV_POLICY", None)
    try:
        from refreekv_cpp.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()
