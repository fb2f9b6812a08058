"""Reads the upstream pin (upstream.txt)."""

from __future__ import annotations

import re
from pathlib import Path

PIN_FILE = Path(__file__).parent.parent / "upstream.txt"


def read_pin() -> tuple[str, str]:
    """The pinned version of llama-cpp-python and the SHA-256 of its sdist."""
    text = PIN_FILE.read_text(encoding="utf-8")
    version = re.search(r"^llama-cpp-python==(\S+)", text, re.MULTILINE)
    sha256 = re.search(r"--hash=sha256:([0-9a-f]{64})", text)
    if not version or not sha256:
        raise SystemExit(f"{PIN_FILE}: needs llama-cpp-python==VERSION and --hash=sha256:HEX")
    return version[1], sha256[1]
