"""The memory of this process, as the operating system counts it."""

from __future__ import annotations

import sys

import psutil


def rss() -> int:
    """Bytes that are resident now, pages of mapped files (the weights) among them."""
    return int(psutil.Process().memory_info().rss)


def rss_peak() -> int | None:
    """The most bytes that were resident at once; None where the system does not say."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":  # getrusage() there begins with the peak of the program that started this one
        return _of_status("VmHWM")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_anonymous() -> int:
    """As `rss`, without pages of files, such as the weights, which the system may take away and bring back; 0 where it
    does not say."""
    return _of_status("RssAnon") or 0


def _of_status(name: str) -> int | None:
    """An entry of Linux's /proc/self/status, in bytes."""
    try:
        with open("/proc/self/status") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith(f"{name}:")), None)
    except OSError:
        return None
