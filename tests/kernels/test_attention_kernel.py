"""The kernel for host memory computes what the graph computes, which other tests compare with the definition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from policies import Debug
from support import CACHE_TYPES, Sequences, load
from tiny import random_tokens
from tiny_architectures import ARCHITECTURES

from refreekv_cpp import ReFreeKV, SnapKV, native

KINDS = {"soft-cap": "gemma2", "ALiBi": "mpt", "sinks": "gpt-oss"}


def attention(model: Path, n_window: int, read: Callable[[Sequences], Any], by_graph: bool, **fields: Any) -> list[Any]:
    """Of every layer: [n_head, n_rows, n_cells]."""
    sequences = Sequences(model, Debug(policy=ReFreeKV(n_window=n_window), by_graph=by_graph), **fields)
    read(sequences)
    rows = [native.read_attention(sequences.ctx, 0, layer) for layer in range(native.stats(sequences.ctx).n_layer)]
    assert (native.stats(sequences.ctx).bytes_read > 0) == by_graph
    sequences.close()
    return rows


def assert_the_same(
    model: Path, n_window: int, read: Callable[[Sequences], Any], tolerance: float = 1e-5, **fields: Any
) -> None:
    ours, theirs = (attention(model, n_window, read, by_graph, **fields) for by_graph in (False, True))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        np.testing.assert_allclose(mine, other, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_attention(tiny: Callable[[str], Path], kind: str) -> None:
    model = tiny(next(title for title in ARCHITECTURES if title.startswith(KINDS[kind])))
    assert_the_same(model, 64, lambda sequences: sequences.read(0, random_tokens(300)))


@pytest.mark.parametrize("n_window", [1, 16, 48, 63, 65, 200])
@pytest.mark.parametrize("n_tokens", [3, 64, 129, 300])
def test_windows_and_prompts_of_any_length(tiny_model: Path, n_window: int, n_tokens: int) -> None:
    assert_the_same(tiny_model, n_window, lambda sequences: sequences.read(0, random_tokens(n_tokens)))


# the graph rounds queries to bf16, too
@pytest.mark.parametrize(("cache", "tolerance"), [("f16", 1e-5), ("bf16", 1e-2)])
def test_types_of_keys(tiny: Callable[[str], Path], cache: str, tolerance: float) -> None:
    fields = {"type_k": CACHE_TYPES[cache], "type_v": CACHE_TYPES[cache]}
    assert_the_same(tiny("gqa64"), 64, lambda sequences: sequences.read(0, random_tokens(300)), tolerance, **fields)


def test_cells_of_other_sequences_between(tiny_model: Path) -> None:
    def read(sequences: Sequences) -> None:
        for i in range(3):
            sequences.read_together({seq_id: random_tokens(150, seed=10 * i + seq_id) for seq_id in range(2)})
        native.prune(sequences.ctx, 0)
        sequences.read(0, random_tokens(30, seed=5))

    assert_the_same(tiny_model, 40, read)


@pytest.mark.parametrize("policy", [ReFreeKV(), SnapKV(budget=0.5)], ids=lambda policy: policy.name)
def test_the_number_of_threads_changes_nothing(tiny_model: Path, policy: Any) -> None:
    states = []
    for n_threads in (1, 3):
        llm = load(tiny_model, policy, n_threads=1, n_threads_batch=n_threads)
        llm.eval(random_tokens(1100))
        assert llm.prune_kv() > 0
        states.append(bytes(llm.save_state().llama_state))
    assert states[0] == states[1]
