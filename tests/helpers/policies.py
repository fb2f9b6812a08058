"""The one table of policies that every test of behaviour goes through. A new policy gets a row here."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from refreekv_cpp import H2O, Policy, PyramidKV, PythonPolicy, ReFreeKV, SnapKV, Streaming, TopP, native

# the presets with their own constants
PRESETS: dict[str, Policy] = {
    "refreekv": ReFreeKV(),
    "paper": ReFreeKV.paper(),
    "released-code": ReFreeKV.released_code(),
    "streaming": Streaming(),
    "snapkv": SnapKV(),
    "h2o": H2O(),
    "pyramidkv": PyramidKV(),
    "top-p": TopP(),
}

# ... and with constants at which each of them takes something out of every tiny model. The random models attend more
# evenly than real ones: what loses 1 % of the norm there is nearly nothing.
POLICIES: dict[str, Policy] = {
    "refreekv": ReFreeKV(),
    "paper": ReFreeKV.paper(threshold=0.1, n_full_layers=1),
    "released-code": ReFreeKV.released_code(threshold=0.4),
    "streaming": Streaming(budget=0.3),
    "snapkv": SnapKV(budget=0.3),
    "h2o": H2O(budget=0.3),
    "pyramidkv": PyramidKV(budget=0.4),
    "top-p": TopP(p=0.8),
    "score-norm-mean": ReFreeKV(measure="norm", rows="mean", threshold=0.02, n_window=32, n_pool=7),
    "score-mass-last": ReFreeKV(rows="last", threshold=0.3, n_recent=0),
    "snapkv-mean": SnapKV(budget=300, pooling="mean", n_window=16, n_pool=5),
    "pyramidkv-gentle": PyramidKV(budget=0.6, beta=2),
    "every-third-row": ReFreeKV(window_step=3),
    "position-mass-worst": ReFreeKV(ranking="position", threshold=0.8, n_sink=1),
}

# everything that can be combined
COMBINATIONS: dict[str, ReFreeKV] = {
    f"{ranking}-{rows}-{measure}-{'sinks-in' if sinks else 'sinks-out'}": ReFreeKV(
        ranking=ranking, rows=rows, measure=measure, sinks_in_measure=sinks
    )
    for ranking, rows, measure, sinks in itertools.product(
        ("position", "score"), ("last", "mean", "worst"), ("norm", "mass"), (False, True)
    )
}


@dataclass(frozen=True, kw_only=True)
class Debug(Policy):
    """Another policy with the debug fields of native/refreekv.h set, and with theta, which only ReFreeKV has."""

    policy: Policy
    mask_only: bool = False
    by_graph: bool = False
    theta: float = 0.0
    max_error: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.policy.name} (debug)"

    def native_options(self) -> dict[str, Any]:
        options = self.policy.native_options()
        assert options is not None
        return {
            **options,
            "mask_only": self.mask_only,
            "by_graph": self.by_graph,
            "theta": self.theta,
            "max_error": self.max_error,
        }


@dataclass(frozen=True, kw_only=True)
class CellByCell(ReFreeKV):
    """Evicts not in blocks of 256 cells, but one by one: the prompts of upstream's tests have a dozen tokens."""

    n_min: int = 0
    n_recent: int = 2
    n_sink: int = 1

    def native_options(self) -> dict[str, Any]:
        return {**super().native_options(), "n_block": 1}


@dataclass(frozen=True, kw_only=True)
class PythonStreaming(PythonPolicy):
    """`Streaming` a second time."""

    budget: float = 0.3
    n_sink: int = 4

    def select(self, attention: Any, positions: Any, layer: int) -> Any:
        n_cells = len(positions)
        n_budget = math.ceil(self.budget * n_cells)
        mask = np.arange(n_cells) >= n_cells - (n_budget - self.n_sink)
        mask[: self.n_sink] = True
        return mask


@dataclass(frozen=True, kw_only=True)
class Elastic(Policy):
    """The full cache that grows with its contents, for a context without a `Llama` (there, it is kv_elastic=True)."""

    name: ClassVar[str] = "elastic"

    def native_options(self) -> dict[str, Any]:
        return {"policy": native.ELASTIC}
