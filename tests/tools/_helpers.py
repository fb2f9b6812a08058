"""Imported first by every tool: what tests share (tests/helpers) can then be imported."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
