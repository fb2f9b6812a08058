from __future__ import annotations

from dataclasses import dataclass

from refreekv_cpp.errors import PolicyError
from refreekv_cpp.policies.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """PyramidKV (arXiv 2406.02069): SnapKV with budgets that fall linearly from the first layer to the last.

    Args:
        budget: the mean over the layers. It and the options that are not named here are those of `SnapKV`.
        beta: the last layer keeps 1/beta of the mean besides the window. 1: every layer keeps the same.
    """

    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise PolicyError(f"beta={self.beta}: must be 1 or more")

    @property
    def name(self) -> str:
        return "pyramidkv"
