"""Short forms of fuzz.py and metadata.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(os.name != "posix", reason="a process is forked")
@pytest.mark.parametrize(("target", "n"), [("state", 1000), ("whole_state", 500), ("block", 400), ("calls", 40)])
def test_no_input_ends_the_process(target: str, n: int, tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).parent / "fuzz.py"), "--target", target, "--inputs", str(n)]
    done = subprocess.run([*command, "--found", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(os.name != "posix", reason="processes are forked")
def test_models_with_made_up_metadata() -> None:
    command = [sys.executable, str(Path(__file__).parent / "metadata.py"), "--inputs", "15"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
