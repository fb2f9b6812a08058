"""What a process takes before it has weights or a cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing

from refreekv_cpp import _process
from refreekv_cpp.fit.unallocated import Unallocated, quiet

_PROGRAM = f"from {__name__} import _main; _main()"


def base_bytes(model_path: str | os.PathLike[str], n_ctx: int) -> int:
    """What a process takes that has the model but neither its weights nor a cache: Python, the libraries, the
    vocabulary. Measured in a process of its own.

    Raises:
        ValueError: it failed.
    """
    arguments = json.dumps([os.fspath(model_path), n_ctx])
    done = subprocess.run([sys.executable, "-c", _PROGRAM, arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"{model_path}: {(done.stderr.strip() or 'the process failed').splitlines()[-1]}")
    return int(done.stdout)


def _main() -> None:
    model_path, n_ctx = json.loads(sys.argv[1])
    with quiet(), closing(Unallocated(model_path, n_ctx=n_ctx, verbose=False)):
        print(_process.rss())
