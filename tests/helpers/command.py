"""The command line tool, run in this process."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from refreekv_cpp.cli import app


def refreekv(*args: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def assert_one_error_line(result: Result, *parts: str) -> None:
    assert result.exit_code == 2
    assert result.stdout == ""
    assert_one_line(result.stderr, *parts)


def assert_one_line(text: str, *parts: str) -> None:
    assert len(text.splitlines()) == 1
    for part in parts:
        assert part in text
