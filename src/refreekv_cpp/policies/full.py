from __future__ import annotations

from dataclasses import dataclass

from refreekv_cpp.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Every cell of every layer stays: upstream's own cache, untouched (or, with kv_elastic, one that grows)."""

    @property
    def name(self) -> str:
        return "full"

    def native_options(self) -> None:
        return None
