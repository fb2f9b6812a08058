"""kv_policy="full" is upstream's own cache: the logits of a library built from the same sources without our hooks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.stock, pytest.mark.model]

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def stock_library() -> Path:
    """The folder of a stock libllama: $REFREEKV_STOCK_LIB, or built here (minutes, the first time)."""
    if folder := os.environ.get("REFREEKV_STOCK_LIB"):
        return Path(folder)
    build = ROOT / "build" / "stock"
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DREFREEKV_STOCK=ON"]
    subprocess.run([*configure, f"-DPython_EXECUTABLE={sys.executable}"], check=True)
    subprocess.run(["cmake", "--build", str(build), "--target", "llama", "mtmd"], check=True)
    return build / "bin"


def logits(out: Path, model: Path, flash_attn: bool, who: str, **environment: str) -> np.ndarray:
    script = ROOT / "tests" / "stock_logits.py"
    subprocess.run(
        [sys.executable, str(script), str(out), str(model), str(int(flash_attn)), who],
        check=True,
        env={**os.environ, **environment},
    )
    return np.load(out)


@pytest.mark.parametrize("flash_attn", [False, True])
def test_full_policy_is_stock_bit_for_bit(
    stock_library: Path, default_model: Path, tmp_path: Path, flash_attn: bool
) -> None:
    ours = logits(tmp_path / "ours.npy", default_model, flash_attn, "ours")
    stock = logits(
        tmp_path / "stock.npy",
        default_model,
        flash_attn,
        "stock",
        LLAMA_CPP_LIB_PATH=str(stock_library),
        MTMD_CPP_LIB=str(stock_library),
    )
    assert ours.shape == stock.shape
    assert len(ours) > 64
    np.testing.assert_array_equal(ours, stock)
