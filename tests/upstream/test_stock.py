"""kv_policy="full" is upstream's own cache: the logits of a library built from the same sources without our hooks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from native_build import ROOT, stock_environment, stock_library

pytestmark = [pytest.mark.stock, pytest.mark.model]


@pytest.fixture(scope="session")
def stock() -> Path:
    return stock_library()


def logits(out: Path, model: Path, flash_attn: bool, who: str, environment: dict[str, str]) -> np.ndarray:
    script = ROOT / "tests" / "helpers" / "stock_logits.py"
    subprocess.run(
        [sys.executable, str(script), str(out), str(model), str(int(flash_attn)), who],
        check=True,
        env=environment,
    )
    return np.load(out)


@pytest.mark.parametrize("flash_attn", [False, True])
def test_full_policy_is_stock_bit_for_bit(stock: Path, default_model: Path, tmp_path: Path, flash_attn: bool) -> None:
    ours = logits(tmp_path / "ours.npy", default_model, flash_attn, "ours", dict(os.environ))
    theirs = logits(tmp_path / "stock.npy", default_model, flash_attn, "stock", stock_environment(stock))
    assert ours.shape == theirs.shape
    assert len(ours) > 64
    np.testing.assert_array_equal(ours, theirs)
