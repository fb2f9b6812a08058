"""Pictures, with matplotlib (the extra `lab`)."""

from __future__ import annotations

import importlib.util
from typing import Any

from refreekv_cpp._extras import needs_extra


def have_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(**options: Any) -> Any:
    """A matplotlib figure that needs no display; options are those of `matplotlib.figure.Figure`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with needs_extra("lab", "a picture"):
        from matplotlib.figure import Figure

    return Figure(layout="constrained", **options)
