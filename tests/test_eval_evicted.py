"""`refreekv eval-evicted`: the attention that evicted cells would have drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import ctx_of, kept, load
from tiny import random_tokens
from typer.testing import CliRunner

from refreekv_cpp import ReFreeKV, native
from refreekv_cpp.cli import app
from refreekv_cpp.eval.evicted import boxed, exact, rank_correlation, rounded, study

PROMPT = random_tokens(1100)


def test_summaries_by_hand() -> None:
    queries = np.array([[1.0, -2.0]], dtype=np.float32)
    keys = np.array([[1.0, 0.0], [3.0, -1.0], [0.0, 5.0]], dtype=np.float32)
    logits, n_cells = exact(queries, keys)
    assert (logits.tolist(), n_cells.tolist()) == ([[1.0, 5.0, -10.0]], [1, 1, 1])
    logits, n_cells = boxed(2)(queries, keys)
    assert (logits.tolist(), n_cells.tolist()) == ([[5.0, -10.0]], [2, 1])
    logits, _ = rounded(1)(queries, np.array([[1.0, 4.0]], dtype=np.float32))
    assert logits.tolist() == [[-7.0]]
    logits, _ = rounded(1)(queries, np.array([[2.0, 2.0]], dtype=np.float32))
    assert logits.tolist() == [[-2.0]]


def test_rank_correlation() -> None:
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(a, a**3) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert np.isnan(rank_correlation(a, np.ones(4)))


def test_a_study(tiny_model: Path) -> None:
    llm = load(tiny_model, ReFreeKV.window())
    result = study(llm, PROMPT, 5)
    truth = result.mass["the keys themselves"]
    assert truth.shape == (5, result.mass["keys of 2 bits"].shape[1])

    # the queries of the first layer know nothing of the pruning yet: they are those of the whole cache
    whole = load(tiny_model, ReFreeKV.window())
    whole.eval([*PROMPT, *llm.input_ids[len(PROMPT) : len(PROMPT) + 5]])
    attention = native.read_attention(ctx_of(whole), 0, 0)[:, -5:, : len(PROMPT)]
    evicted = np.setdiff1d(np.arange(len(PROMPT)), kept(llm)[0])
    np.testing.assert_allclose(truth[:, : attention.shape[0]], attention[:, :, evicted].sum(axis=2).T, rtol=0.02)

    assert np.abs(result.mass["keys of 4 bits"] - truth).max() < 0.05
    for bound in ("bounds over 16 cells", "bounds over 64 cells"):
        assert np.all(result.mass[bound] >= truth - 1e-6)
    assert result.kl.shape == (5,)
    assert result.kl.min() > 0


def test_the_command(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(" ".join(f"word{i}" for i in range(400)))
    arguments = ["eval-evicted", str(tiny_model), "--text", str(text), "--tokens", "700", "--answer", "3"]
    result = CliRunner().invoke(app, [*arguments, "--kv-policy", "window", "--threads", "1"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("bounds over") == 2
    assert "700 tokens" in result.stderr
    for policy in ("streaming", "full"):
        result = CliRunner().invoke(app, [*arguments, "--kv-policy", policy, "--threads", "1"])
        assert (result.exit_code, "policies that look at attention" in " ".join(result.stderr.split())) == (2, True)
