from __future__ import annotations

import re

from refreekv_cpp.errors import PolicyError

_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(size: int | str, *, option: str = "kv_memory_limit") -> int:
    """Bytes from a number or from text such as "512MiB" or "1.5 GB".

    Raises:
        PolicyError: it is neither, or not positive.
    """
    match = re.fullmatch(r"([0-9.]+)\s*([KMG]?I?B|)", str(size).strip().upper())
    try:
        n_bytes = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    except (KeyError, ValueError, OverflowError):
        n_bytes = 0
    if not 0 < n_bytes < 2**63:
        raise PolicyError(f"{option}={size!r}: must be a positive number of bytes, or text such as '512MiB' or '1.5GB'")
    return n_bytes


def mebibytes(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"
