from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from refreekv_cpp.native import enum_value
from refreekv_cpp.policies._checks import check_budget, check_not_negative
from refreekv_cpp.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Streaming(Policy):
    """StreamingLLM (arXiv 2309.17453): attention sinks and the most recent cells, a fixed budget, every layer alike.

    Args:
        budget: what is kept of the prompt: a fraction in (0, 1], or a number of cells when above 1.
        n_sink: first positions that are always kept.
        n_min: prompts shorter than this many tokens are left whole.
    """

    budget: float = 0.4
    n_sink: int = 4
    n_min: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget)
        check_not_negative(self, "n_sink", "n_min")

    @property
    def name(self) -> str:
        return "streaming"

    def native_options(self) -> dict[str, Any]:
        return {"policy": enum_value("POLICY_STREAMING"), "n_full_layers": 0, "n_recent": 0, **self.as_dict()}
