"""What the parameters of several policies have in common: their valid values, and the errors that name them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from refreekv_cpp.errors import PolicyError


def check_choice(policy: Any, option: str, valid: Sequence[str]) -> None:
    value = getattr(policy, option)
    if value not in valid:
        raise PolicyError(f"{option}={value!r}: must be one of {', '.join(map(repr, valid))}")


def check_not_negative(policy: Any, *options: str) -> None:
    for option in options:
        if getattr(policy, option) < 0:
            raise PolicyError(f"{option}={getattr(policy, option)}: must not be negative")


def check_budget(budget: float) -> None:
    if not budget > 0:
        raise PolicyError(f"budget={budget}: must be a fraction in (0, 1] or a number of cells above 1")


def check_window(n_window: int) -> None:
    if not 1 <= n_window <= 256:
        raise PolicyError(f"n_window={n_window}: must be from 1 to 256")


def check_pool(n_pool: int) -> None:
    if n_pool < 1 or n_pool % 2 == 0:
        raise PolicyError(f"n_pool={n_pool}: must be odd and positive")
