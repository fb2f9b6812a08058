from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from refreekv_cpp.native import enum_value
from refreekv_cpp.policies._checks import (
    check_budget,
    check_choice,
    check_not_negative,
    check_pool,
    check_window,
)
from refreekv_cpp.policies.base import Policy

Pooling = Literal["mean", "max"]


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """SnapKV (arXiv 2404.14469): keeps the cells of the last queries, and those before that get the most attention from
    them. The budget is fixed, and the same in every layer. All heads of a layer keep the same cells, chosen by the mean
    over the heads. The defaults, except for the budget, are those of the method's LongBench runs.

    Args:
        budget: what is kept of the prompt: a fraction in (0, 1], or a number of cells when above 1.
        n_window: queries that are looked at, and whose cells are kept, 1 to 256.
        n_pool: over how many positions the attention is pooled, odd.
        pooling: how it is pooled: by the "max" or the "mean" of these positions.
        n_min: prompts shorter than this many tokens are left whole.
    """

    budget: float = 0.4
    n_window: int = 32
    n_pool: int = 7
    pooling: Pooling = "max"
    n_min: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget)
        check_window(self.n_window)
        check_pool(self.n_pool)
        check_choice(self, "pooling", get_args(Pooling))
        check_not_negative(self, "n_min")

    @property
    def name(self) -> str:
        return "snapkv"

    def native_options(self) -> dict[str, Any]:
        return {
            **self.as_dict(),
            "policy": enum_value(f"POLICY_{self.name.upper()}"),
            "pooling": enum_value(f"POOLING_{self.pooling.upper()}"),
            "n_sink": 0,
        }
