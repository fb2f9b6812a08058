"""The command line tool `refreekv`."""

from __future__ import annotations

from refreekv_cpp.cli.app import app, main

__all__ = ["app", "main"]
