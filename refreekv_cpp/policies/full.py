from __future__ import annotations

from dataclasses import dataclass

from refreekv_cpp.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Upstream's own cache, untouched: every cell of every layer, allocated for n_ctx at load."""

    @property
    def name(self) -> str:
        return "full"

    def native_options(self) -> None:
        return None
