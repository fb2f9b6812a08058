"""kv_cold_type: evicted rows that are rounded while they wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from policies import Debug
from support import CACHE_TYPES, ctx_of, feed, kept, load
from tiny import random_tokens

from refreekv_cpp import Llama, Policy, PolicyError, ReFreeKV, native

Tiny = Callable[[str], Path]

PROMPT = random_tokens(700)
MORE = random_tokens(5, seed=1)
POLICY = ReFreeKV(n_min=0)
F16_TO_Q8_0 = 34 / 64
"""Bytes of a block of 32."""


def pruned(path: Path, policy: Policy = POLICY, **options: Any) -> Llama:
    llm = load(path, policy, **options)
    llm.eval(PROMPT)
    assert llm.prune_kv() > 0
    return llm


def keys(llm: Llama, layer: int) -> npt.NDArray[np.float32]:
    return native.read_keys(ctx_of(llm), 0, layer)[0]


@pytest.mark.parametrize("flash_attn", [False, True], ids=["", "flash attention"])
@pytest.mark.parametrize("cold", ["memory", "file"])
def test_rows_come_back_rounded_and_those_that_stayed_as_they_were(tiny: Tiny, cold: str, flash_attn: bool) -> None:
    options = {"kv_cold": cold, "flash_attn": flash_attn}
    plain, rounded = pruned(tiny("gqa64"), **options), pruned(tiny("gqa64"), kv_cold_type="q8_0", **options)
    assert rounded.kv_stats.bytes_cold == plain.kv_stats.bytes_cold * F16_TO_Q8_0

    stayed = kept(rounded)
    for llm in (plain, rounded):
        native.restore(ctx_of(llm), 0)

    n_rounded = 0
    for layer, positions in enumerate(stayed):
        before, after = keys(plain, layer), keys(rounded, layer)
        assert np.array_equal(before[positions], after[positions])
        # half a step of a block, and what f16 makes of it
        step = np.abs(before.reshape(-1, 32)).max(-1).repeat(32).reshape(before.shape) / 127
        assert (np.abs(after - before) <= step * 0.5 + np.abs(before) * 2**-10).all()
        n_rounded += int((after != before).sum())
    assert n_rounded > 0

    # V, too
    expected, actual = feed(plain, MORE), feed(rounded, MORE)
    assert not np.array_equal(expected, actual)
    assert np.abs(actual - expected).max() <= 2e-2 * np.abs(expected).max()


def test_rows_that_a_graph_moves_are_rounded_too(tiny: Tiny) -> None:
    by_host = pruned(tiny("gqa64"), kv_cold_type="q8_0")
    by_graph = pruned(tiny("gqa64"), Debug(policy=POLICY, by_graph=True), kv_cold_type="q8_0")
    assert by_graph.kv_stats.bytes_cold == by_host.kv_stats.bytes_cold

    for llm in (by_host, by_graph):
        native.restore(ctx_of(llm), 0)
    assert np.array_equal(feed(by_host, MORE), feed(by_graph, MORE))


def test_a_quantised_cache_stays_as_it_is(tiny: Tiny) -> None:
    options = {"flash_attn": True, "type_k": CACHE_TYPES["q8_0"], "type_v": CACHE_TYPES["q4_0"]}
    llms = []
    for kv_cold_type in (None, "q8_0"):
        llm = load(tiny("gqa64"), POLICY, kv_cold_type=kv_cold_type, **options)
        llm.eval(PROMPT)
        assert llm.prune_kv() > 0
        llms.append(llm)
    plain, llm = llms

    assert llm.kv_stats.bytes_cold == plain.kv_stats.bytes_cold > 0
    for one in llms:
        native.restore(ctx_of(one), 0)
    assert np.array_equal(feed(plain, MORE), feed(llm, MORE))


def test_states_of_one_are_read_by_the_other(tiny: Tiny) -> None:
    """A state has the rows in the cache's type."""
    rounded = pruned(tiny("gqa64"), kv_cold_type="q8_0")
    state = rounded.save_state()
    native.restore(ctx_of(rounded), 0)
    expected = feed(rounded, MORE)

    for kv_cold_type in (None, "q8_0"):
        other = load(tiny("gqa64"), POLICY, kv_cold_type=kv_cold_type)
        other.load_state(state)
        native.restore(ctx_of(other), 0)
        actual = feed(other, MORE)
        # rounding once more changes next to nothing
        assert np.abs(actual - expected).max() <= (0 if kv_cold_type is None else 1e-2) * np.abs(expected).max()


def test_what_is_no_such_type_is_said_before_any_work() -> None:
    with pytest.raises(PolicyError, match="kv_cold_type='q4_0': must be one of None, 'q8_0'"):
        Llama("no such model", kv_policy="refreekv", kv_cold_type="q4_0")  # type: ignore[arg-type]
