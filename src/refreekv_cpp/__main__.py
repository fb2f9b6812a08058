"""`python -m refreekv_cpp` is `refreekv`."""

from __future__ import annotations

import os

os.environ.pop("REFREEKV_POLICY", None)  # as cmake/refreekv_command.py does

from refreekv_cpp.cli import main

if __name__ == "__main__":
    main()
