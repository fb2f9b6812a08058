from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """ ", did you mean 'x'?" when a valid name is near, else ""."""
    match = difflib.get_close_matches(name, list(valid), n=1)
    return f", did you mean {match[0]!r}?" if match else ""
