"""The cache on a device whose memory the host cannot see: what it answers, and what of it comes to the host."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backends import CODES, N_PROMPT, SCENARIOS, TABLE_POLICIES, answer
from far_device import FarDevice, compile_device, plugged_in
from policies import POLICIES
from support import CACHE_TYPES, ctx_of, feed, kept, load, logits
from tiny import random_tokens

from refreekv_cpp import Llama, ReFreeKV, native

pytestmark = pytest.mark.device

Tiny = Callable[[str], Path]

PROMPT = random_tokens(N_PROMPT)
MORE = random_tokens(9, seed=1)[1:]

# the types of K and V that the host copies as bytes and the device gathers as words
CACHES = {
    "f16, V transposed": {},
    "f32, V transposed": {"type_k": CACHE_TYPES["f32"], "type_v": CACHE_TYPES["f32"]},
    "bf16, V transposed": {"type_k": CACHE_TYPES["bf16"], "type_v": CACHE_TYPES["bf16"]},
    "f16": {"flash_attn": True},
    "q8_0, q4_0": {"flash_attn": True, "type_k": CACHE_TYPES["q8_0"], "type_v": CACHE_TYPES["q4_0"]},
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_device(tmp_path_factory.mktemp("device"))


@pytest.fixture
def device(library: Path) -> Iterator[FarDevice]:
    with plugged_in(library) as device:
        yield device
        gc.collect()


def on_device(path: Path, policy: str, **options: Any) -> Llama:
    return load(path, POLICIES.get(policy, policy), n_gpu_layers=-1, **options)


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        *((policy, "all layers") for policy in TABLE_POLICIES),
        *((policy, name) for policy in ("refreekv", "streaming") for name in SCENARIOS if name != "all layers"),
        *((CODES, name) for name in SCENARIOS),
    ],
)
def test_it_answers_as_the_cpu(tiny: Tiny, library: Path, policy: str, name: str) -> None:
    scenario = SCENARIOS[name]
    expected = answer(tiny(scenario.model), policy, scenario)
    with plugged_in(library):
        found = answer(tiny(scenario.model), policy, scenario)
    assert found.bytes_bounced == 0
    # a build without another backend has other kernels for the weights on the CPU, which move logits by 1e-2 and now
    # and then a cell; of a quantised cache the device looks at K dequantised, where queries are not rounded
    n_others = sum(len(set(a) ^ set(b)) for a, b in zip(found.kept, expected.kept, strict=True))
    assert n_others <= 0.05 * sum(map(len, expected.kept))
    if name != "q8_0 cache":
        np.testing.assert_allclose(found.logits, expected.logits, atol=0.05)


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_rows_keep_their_bytes_on_the_device(tiny: Tiny, device: FarDevice, cache: dict[str, Any]) -> None:
    """... through growing, evicting, the cold store and back."""
    llm = on_device(tiny("gqa64"), "refreekv", **cache)
    llm.eval(PROMPT)
    before = llm.save_state().llama_state
    expected = feed(llm, MORE)
    llm.n_tokens = N_PROMPT
    llm.eval(PROMPT[-1:])  # rewinds
    llm.n_tokens = N_PROMPT
    assert llm.prune_kv() > 0
    assert native.restore(ctx_of(llm), 0) > 0
    assert llm.save_state().llama_state == before
    np.testing.assert_array_equal(feed(llm, MORE), expected)
    assert llm.kv_stats.bytes_bounced == 0


def test_reading_and_growing_brings_nothing_but_logits_to_the_host(tiny: Tiny, device: FarDevice) -> None:
    llm = on_device(tiny("gqa"), "refreekv")
    device.forget()
    llm.eval(PROMPT)
    feed(llm, MORE)
    assert llm.kv_stats.cells_capacity[0] > N_PROMPT
    assert {crossing.name for crossing in device.to_host()} == {"result_output"}


@pytest.mark.parametrize("policy", [policy for policy in TABLE_POLICIES if policy != "full"])
@pytest.mark.parametrize("cache", [CACHES["f16, V transposed"], CACHES["q8_0, q4_0"]], ids=["f16", "quantised"])
def test_a_pruning_reads_back_numbers_and_no_keys_or_values(
    tiny: Tiny, device: FarDevice, policy: str, cache: dict[str, Any]
) -> None:
    llm = on_device(tiny("gqa64"), policy, kv_evicted="drop", **cache)
    llm.eval(PROMPT)
    device.forget()
    assert llm.prune_kv() > 0
    stats = llm.kv_stats
    read = device.to_host()
    assert sum(crossing.size for crossing in read) == stats.bytes_read

    # a score for each cell, and for each query that is looked at, in each head, a sum per block of 256 cells
    n_head, n_layer = 4, len(stats.cells_kept)
    n_rows = getattr(POLICIES[policy], "n_window", 64)
    n_blocks = 1 + N_PROMPT // 256
    assert len(read) <= 2 * n_layer
    assert all(crossing.size <= 4 * max(N_PROMPT, n_head * n_rows * n_blocks) for crossing in read)
    assert stats.bytes_bounced == 0


def test_only_evicted_rows_go_to_the_cold_store(tiny: Tiny, device: FarDevice) -> None:
    llm = on_device(tiny("gqa64"), "refreekv")
    llm.eval(PROMPT)
    device.forget()
    llm.prune_kv()
    stats = llm.kv_stats
    assert stats.cold == "memory"
    assert stats.bytes_cold == stats.bytes_full - stats.bytes_kept > 0
    assert sum(crossing.size for crossing in device.to_host()) == stats.bytes_read + stats.bytes_cold

    device.forget()
    native.restore(ctx_of(llm), 0)
    assert device.to_host() == []


@pytest.mark.parametrize(
    ("missing", "what_comes"),
    [
        (["POOL_2D"], "keys"),
        (["GET_ROWS"], "all rows"),
        (["CONCAT"], "all rows"),
    ],
    ids=["POOL_2D", "GET_ROWS", "CONCAT"],
)
@pytest.mark.parametrize("cache", [CACHES["f16, V transposed"], CACHES["q8_0, q4_0"]], ids=["f16", "quantised"])
def test_without_a_kernel_the_host_does_it_and_counts(
    tiny: Tiny, device: FarDevice, missing: list[str], what_comes: str, cache: dict[str, Any]
) -> None:
    def run() -> tuple[list[list[int]], np.ndarray, int]:
        llm = on_device(tiny("gqa64"), "refreekv", **cache)
        llm.eval(PROMPT)
        llm.prune_kv()
        cells, row = kept(llm), logits(llm)
        native.restore(ctx_of(llm), 0)
        assert kept(llm) == [list(range(N_PROMPT))] * len(cells)
        return cells, np.array([row, *feed(llm, MORE)]), llm.kv_stats.bytes_bounced

    expected_kept, expected, bounced = run()
    assert bounced == 0
    with device.without(*missing):
        found_kept, found, bounced = run()
    assert bounced > 0, what_comes
    assert found_kept == expected_kept
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_library_needs_all_layers_in_host_memory(tiny: Tiny, device: FarDevice, tmp_path: Path) -> None:
    llm = load(tiny("gqa64"), ReFreeKV(), codes=True, kv_library=tmp_path, n_gpu_layers=3)
    llm.eval(PROMPT)
    llm.prune_kv()
    assert native.library_refusal(ctx_of(llm)) == "a part of the cache is not in host memory"
    assert llm.keep_kv() == 0
