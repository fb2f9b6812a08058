"""Short forms of the programs in docs/development/reliability.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import faults
import pytest

TOOLS = Path(__file__).parents[1] / "tools"


def run(program: str, *options: str) -> None:
    command = [sys.executable, str(TOOLS / program), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(faults.compiler() is None, reason="it needs Linux and a C++ compiler")
@pytest.mark.parametrize("evicted", ["keep", "restore"])
def test_allocations_and_calls_on_files_fail(evicted: str) -> None:
    run("faults.py", "--most", "5", "--evicted", evicted)


@pytest.mark.skipif(os.name != "posix", reason="a process is killed")
def test_processes_are_killed() -> None:
    run("kills.py", "--kills", "9")


@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
def test_nothing_grows() -> None:
    run("soak.py", "--tokens", "12000")


def test_random_requests() -> None:
    run("server_fuzz.py", "--seconds", "10")
