"""`refreekv eval` with our kernels for devices, on the device of tests, which computes them on the host:
docs/lab/backends.md.

python tests/tools/eval_on_device.py MODEL --data DIR --out RUN --policies refreekv [...]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import _helpers  # noqa: F401  (first: it makes the imports of functions possible)

if __name__ == "__main__":
    os.environ["REFREEKV_DEVICE_KERNELS"] = "1"
    from far_device import compile_device, plugged_in

    from refreekv_cpp.cli import main

    sys.argv[1:1] = ["eval", "--gpu-layers", "all"]
    with tempfile.TemporaryDirectory() as folder, plugged_in(compile_device(Path(folder))):
        main()
