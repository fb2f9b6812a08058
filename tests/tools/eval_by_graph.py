"""`refreekv eval` on the CPU, attending to codes by ggml's operations as on a device: docs/lab/backends.md.

python tests/tools/eval_by_graph.py MODEL --data DIR --out RUN --policies refreekv [...]
"""

from __future__ import annotations

import sys
from typing import Any

from refreekv_cpp import ReFreeKV
from refreekv_cpp.cli import main

_options = ReFreeKV.native_options


def _by_graph(self: ReFreeKV) -> dict[str, Any]:
    return {**_options(self), "by_graph": True}


if __name__ == "__main__":
    ReFreeKV.native_options = _by_graph  # type: ignore[method-assign]
    sys.argv.insert(1, "eval")
    main()
