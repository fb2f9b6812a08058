"""The memory of this machine, or of the container that this process runs in."""

from __future__ import annotations

from pathlib import Path

import psutil


def host_total() -> int:
    """Bytes of memory that the machine has, or that the container gives to its processes."""
    limit = _container()
    total = int(psutil.virtual_memory().total)
    return total if limit is None else min(total, limit[0])


def host_free() -> int:
    """Bytes of memory that this process could still take without others having to give up theirs."""
    limit = _container()
    free = int(psutil.virtual_memory().available)
    return free if limit is None else min(free, limit[1])


def _container() -> tuple[int, int] | None:
    """The limit of a control group on memory and what is free of it; None: there is none."""
    for folder, limit_name, used_name in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit, used = (int(Path(folder, name).read_text()) for name in (limit_name, used_name))
            statistics = Path(folder, "memory.stat").read_text().split()
        except (OSError, ValueError):  # no control groups, or "max": no limit
            continue
        # pages of files can be given back
        cached = dict(zip(statistics[::2], statistics[1::2], strict=False)).get("inactive_file", "0")
        return limit, max(limit - used + int(cached), 0)
    return None
