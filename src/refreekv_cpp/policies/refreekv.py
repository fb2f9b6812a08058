from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from refreekv_cpp.errors import PolicyError
from refreekv_cpp.native import enum_value
from refreekv_cpp.policies._checks import check_choice, check_not_negative, check_pool, check_window
from refreekv_cpp.policies.base import Policy

Ranking = Literal["position", "score"]
Rows = Literal["last", "mean", "worst"]
Measure = Literal["norm", "mass"]

_CHOICES = {"ranking": get_args(Ranking), "rows": get_args(Rows), "measure": get_args(Measure)}


@dataclass(frozen=True, kw_only=True)
class ReFreeKV(Policy):
    """The policy `refreekv`: the first and the last cells stay exact, and all others become codes, which get attention
    too (docs/explanation/three-tiers.md).

    If there can be no codes, or if you set a parameter of the rule, a rule chooses the exact cells by their attention,
    after ReFreeKV (arXiv 2502.16886, section 3). Each layer ranks its cells, and keeps as few of the first ones as
    possible, such that at most `threshold` of a measure of the last queries' attention is lost. There is no budget to
    choose. docs/reference/policies.md has the details.

    `ReFreeKV.paper()` is the paper's own rule, `ReFreeKV.released_code()` that of its released code.

    Args:
        threshold: of the rule: the part of the measure that may be lost, 0 to 1.
        ranking: of the rule. "position": sinks, then from the last position backwards (the paper's). "score": sinks,
            recent, then by the maximum over heads of the mean attention of the window, max-pooled over positions.
        rows: of the rule: which attention rows are measured. "last": that of the last query, averaged over heads (the
            paper's). "mean": the mean over the window and heads. "worst": every row in every head has to stay within
            the threshold.
        measure: of the rule. "norm": the L2 norm of a row (the paper's). "mass": its sum.
        sinks_in_measure: of the rule: whether the sinks count in the measure.
        n_window: of the rule: how many of the prompt's last queries are looked at, 1 to 256.
        window_step: of the rule: look at every n-th of these queries, counted back from the last.
        n_sink: how many first positions always stay exact (the sinks).
        n_recent: of the rule: last positions that the score ranking always keeps.
        theta: the share of a head's attention from which on the exact row of an evicted cell is read from the cold
            store. For all other evicted cells their codes are used (4 bits for K, 2 for V). 0: there are no codes, and
            evicted cells get no attention. On a device no rows are read; models with ALiBi have no codes.
        max_error: read so many more rows that codes misplace no more than this share of any head's attention. 0: only
            theta decides. The bound follows from the steps of the codes, as in verified sparse attention (arXiv
            2510.05688).
        n_hot: how many last positions stay exact besides the sinks, without looking at attention. 0: the rule decides.
            None: 64, or 0 if a parameter of the rule is not the default. A larger number saves reads and hardly changes
            the answer (docs/lab/constants.md).
        n_full_layers: leading attention layers that are kept whole.
        n_pool: of the rule: width of the max-pool over scores in positions, odd.
        mass_floor: of the rule: floor of the denominator of the mass, for rows whose mass is nearly all in the sinks.
        n_min: prompts shorter than this many tokens are left whole.
    """

    threshold: float = 0.35
    ranking: Ranking = "score"
    rows: Rows = "worst"
    measure: Measure = "mass"
    sinks_in_measure: bool = False
    n_window: int = 64
    window_step: int = 1
    n_sink: int = 4
    n_recent: int = 32
    theta: float = 0.003
    max_error: float = 0.0
    n_hot: int | None = None
    n_full_layers: int = 0
    n_pool: int = 7
    mass_floor: float = 0.05
    n_min: int = 512

    @classmethod
    def paper(cls, **options: Any) -> ReFreeKV:
        """The paper's formula read literally: last row, position order, norm with the sinks, 1 %, two whole layers."""
        return cls(**{**_PAPER, **options})

    @classmethod
    def released_code(cls, **options: Any) -> ReFreeKV:
        """The released code's reading: as the paper's, but the sinks are not in the norm."""
        return cls(**{**_PAPER, "sinks_in_measure": False, **options})

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, valid in _CHOICES.items():
            check_choice(self, option, valid)
        for option in ("threshold", "mass_floor"):
            if not 0 <= getattr(self, option) <= 1:
                raise PolicyError(f"{option}={getattr(self, option)}: must be from 0 to 1")
        if not 0 <= self.theta < 1:
            raise PolicyError(f"theta={self.theta}: must be from 0 to less than 1")
        if not 0 <= self.max_error < 1:
            raise PolicyError(f"max_error={self.max_error}: must be from 0 to less than 1")
        if self.max_error > 0 and self.theta == 0:
            raise PolicyError(f"max_error={self.max_error}: needs theta, without which there are no codes")
        check_window(self.n_window)
        if not 1 <= self.window_step <= self.n_window:
            raise PolicyError(f"window_step={self.window_step}: must be from 1 to n_window={self.n_window}")
        check_pool(self.n_pool)
        check_not_negative(self, "n_sink", "n_recent", "n_full_layers", "n_min")
        if self.n_hot is not None:
            check_not_negative(self, "n_hot")

    @property
    def name(self) -> str:
        for name, preset in (
            ("refreekv", ReFreeKV()),
            ("paper", ReFreeKV.paper()),
            ("released-code", ReFreeKV.released_code()),
        ):
            if self == preset:
                return name
        return "refreekv (own parameters)"

    def native_options(self) -> dict[str, Any]:
        options = asdict(self)
        options["n_hot"] = (
            self.n_hot
            if self.n_hot is not None
            else 64 * (self == replace(ReFreeKV(), **{name: getattr(self, name) for name in _NOT_THE_RULES}))
        )
        for option in _CHOICES:
            options[option] = enum_value(f"{option}_{options[option]}".upper())
        return {"policy": enum_value("POLICY_REFREEKV"), **options}


# parameters that say nothing of how the rule judges cells
_NOT_THE_RULES = ("theta", "max_error", "n_sink", "n_full_layers", "n_min")

_PAPER: dict[str, Any] = {
    "threshold": 0.01,
    "ranking": "position",
    "rows": "last",
    "measure": "norm",
    "sinks_in_measure": True,
    "n_recent": 0,
    "theta": 0.0,
    "n_full_layers": 2,
}
