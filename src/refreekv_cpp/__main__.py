"""`python -m refreekv_cpp` is `refreekv`."""

from __future__ import annotations

from refreekv_cpp.cli import main

if __name__ == "__main__":
    main()
