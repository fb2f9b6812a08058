"""Evicted cells that an answer turns out to need (`kv_faults`)."""

from __future__ import annotations

from refreekv_cpp.errors import PolicyError

# a block of evicted cells counts where it would draw more than this part of a head's attention: docs/fidelity.md
TOLERANCE = 0.05


def check(faults: bool | float | None, evicted: str) -> float:
    """The tolerance; 0: there are no faults.

    Raises:
        PolicyError: neither a bool nor a part of 1, or evicted rows are not kept.
    """
    if faults is None or faults == 0:
        return 0.0
    if not isinstance(faults, (int, float)) or not (faults is True or 0 < faults < 1):
        raise PolicyError(f"kv_faults={faults!r}: valid are True, False, and a tolerance between 0 and 1")
    if evicted != "restore":
        raise PolicyError(f"kv_faults={faults}: needs kv_evicted='restore', not {evicted!r}")
    return TOLERANCE if faults is True else float(faults)
