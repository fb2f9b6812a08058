from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from refreekv_cpp.native import enum_value
from refreekv_cpp.policies._checks import check_budget, check_not_negative, check_window
from refreekv_cpp.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """H2O (arXiv 2306.14048), over the last queries: half of a fixed budget is for the most recent cells, half for
    those with the most accumulated attention of the last `n_window` queries (the mean over heads). The budget is the
    same in every layer.

    Args:
        budget: what is kept of the prompt: a fraction in (0, 1], or a number of cells when above 1.
        n_window: queries whose attention is accumulated, 1 to 256. The published method accumulates over all queries.
        n_min: prompts shorter than this many tokens are left whole.
    """

    budget: float = 0.4
    n_window: int = 256
    n_min: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget)
        check_window(self.n_window)
        check_not_negative(self, "n_min")

    @property
    def name(self) -> str:
        return "h2o"

    def native_options(self) -> dict[str, Any]:
        return {"policy": enum_value("POLICY_H2O"), "n_sink": 0, **self.as_dict()}
