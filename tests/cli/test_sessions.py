"""The file of a conversation is private, and whole at any moment."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from refreekv_cpp._cache_dir import VARIABLE
from refreekv_cpp.cli.sessions import Session

MESSAGES = [{"role": "user", "content": "a"}]


@pytest.fixture
def sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path / "sessions"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_nobody_else_can_read_it(sessions: Path) -> None:
    Session("a").write(MESSAGES)
    assert [path.name for path in sessions.iterdir()] == ["a.json"]
    assert stat.S_IMODE(sessions.stat().st_mode) == 0o700
    assert stat.S_IMODE((sessions / "a.json").stat().st_mode) == 0o600


def test_a_killed_process_leaves_nothing_for_ever(sessions: Path) -> None:
    # once its temporary file stayed, with all of the conversation in it
    Session("a").write(MESSAGES)
    killed = """
import os, signal
from pathlib import Path
from refreekv_cpp.cli.sessions import Session
Path.replace = lambda *args: os.kill(os.getpid(), 9) if os.name == "posix" else os._exit(1)
Session("a").write([{"role": "user", "content": "b"}])
"""
    assert subprocess.run([sys.executable, "-c", killed], env=os.environ).returncode != 0
    assert len(list(sessions.iterdir())) == 2
    assert Session("a").messages == MESSAGES
    assert [path.name for path in sessions.iterdir()] == ["a.json"]
