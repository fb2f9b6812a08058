"""Reads the upstream pin (upstream.txt), and gives the package its dependency on it.

`dynamic_metadata` is scikit-build-core's protocol for metadata providers (pyproject.toml, tool.scikit-build.metadata).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PIN_FILE = Path(__file__).parent.parent / "upstream.txt"

# what the package needs at run time besides upstream
DEPENDENCIES = ["numpy>=1.24", "typing-extensions>=4.5", "cffi>=1.16", "typer>=0.12", "rich>=13", "platformdirs>=4"]


def read_pin() -> tuple[str, str]:
    """The pinned version of llama-cpp-python and the SHA-256 of its sdist."""
    text = PIN_FILE.read_text(encoding="utf-8")
    version = re.search(r"^llama-cpp-python==(\S+)", text, re.MULTILINE)
    sha256 = re.search(r"--hash=sha256:([0-9a-f]{64})", text)
    if not version or not sha256:
        raise SystemExit(f"{PIN_FILE}: needs llama-cpp-python==VERSION and --hash=sha256:HEX")
    return version[1], sha256[1]


def dynamic_metadata(field: str, settings: Mapping[str, Any], project: Mapping[str, Any] | None = None) -> list[str]:
    if field != "dependencies" or settings:
        raise RuntimeError("upstream_pin provides the field 'dependencies' and takes no settings")
    return [f"llama-cpp-python=={read_pin()[0]}", *DEPENDENCIES]
