"""How exactly an answer attends to what was evicted (`kv_faults`)."""

from __future__ import annotations

from dataclasses import dataclass

from refreekv_cpp.errors import PolicyError

# of a head's attention, the part at which an evicted row is read
THETA = 0.003


@dataclass(frozen=True)
class Faults:
    """theta: 0: there are none. needed: a model that cannot have them is refused."""

    theta: float
    needed: bool


def check(faults: bool | float | None, evicted: str) -> Faults:
    """What `kv_faults` means. None: where they can be had.

    Raises:
        PolicyError: neither a bool nor a part of 1, or evicted rows are not kept.
    """
    if faults is None:
        return Faults(THETA if evicted == "restore" else 0.0, needed=False)
    if not isinstance(faults, (int, float)) or not (faults is True or 0 <= faults < 1):
        raise PolicyError(f"kv_faults={faults!r}: must be True, False, or a part of 1")
    if faults == 0:
        return Faults(0.0, needed=False)
    if evicted != "restore":
        raise PolicyError(f"kv_faults={faults}: needs kv_evicted='restore', not {evicted!r}")
    return Faults(THETA if faults is True else float(faults), needed=True)
