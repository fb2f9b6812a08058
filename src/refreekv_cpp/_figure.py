"""Pictures, with matplotlib (the extra `eval`)."""

from __future__ import annotations

import importlib.util
from typing import Any


def have_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(**options: Any) -> Any:
    """A matplotlib figure that needs no display; options are those of `matplotlib.figure.Figure`."""
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **options)
