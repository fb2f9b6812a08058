"""Model architectures: tiny models with random weights."""

from __future__ import annotations

from tiny_architectures import ARCHITECTURES

from compatibility.check import Run, check
from compatibility.options import assert_right


def register(name: str, title: str) -> None:
    @check(f"architecture: {title}")
    def architecture(run: Run) -> None:
        assert_right(run, name)


for name, architecture in ARCHITECTURES.items():
    register(name, architecture.title)
