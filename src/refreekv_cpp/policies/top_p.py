from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from refreekv_cpp.errors import PolicyError
from refreekv_cpp.native import enum_value
from refreekv_cpp.policies._checks import check_not_negative, check_window
from refreekv_cpp.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class TopP(Policy):
    """Top-p, after Twilight (arXiv 2502.02770): keeps the cells of the last queries, and the fewest cells before them
    that hold the part `p` of the mean attention of these queries. There is no fixed budget.

    Args:
        p: the part of the attention that stays, above 0 and up to 1. The mean is over the queries and the heads.
        n_window: queries that are looked at, and whose cells are kept, 1 to 256.
        n_min: prompts shorter than this many tokens are left whole.
    """

    p: float = 0.9
    n_window: int = 32
    n_min: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise PolicyError(f"p={self.p}: must be above 0 and at most 1")
        check_window(self.n_window)
        check_not_negative(self, "n_min")

    @property
    def name(self) -> str:
        return "top-p"

    def native_options(self) -> dict[str, Any]:
        return {
            "policy": enum_value("POLICY_TOP_P"),
            "top_p": self.p,
            "n_window": self.n_window,
            "n_sink": 0,
            "n_min": self.n_min,
        }
