"""What a pruned cache computes is what the model computes with the evicted positions masked, layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import reference
from policies import POLICIES, Debug
from support import CACHE_TYPES, F16, F32, ctx_of, feed, kept, load, logits
from tiny import random_tokens

from refreekv_cpp import Full, Llama, Policy, ReFreeKV, native

N_PROMPT = 1060
N_DECODED = 64

PROMPT = random_tokens(N_PROMPT)
DECODED = random_tokens(N_DECODED + 1, seed=1)[1:]


def by_hand(n_layer: int, n_prompt: int = N_PROMPT) -> list[list[int]]:
    """Kept sets that differ in each layer in size and in kind."""
    rng = np.random.default_rng(5)
    sets = [
        sorted(rng.choice(n_prompt, n_prompt // 3, replace=False).tolist()),  # scattered
        [*range(4), *range(n_prompt - 100, n_prompt)],  # sinks and recent
        [n_prompt - 1],
        list(range(0, n_prompt, 2)),
    ]
    return [sets[layer % len(sets)] for layer in range(n_layer)]


def evict(llm: Llama, sets: list[list[int]]) -> None:
    for layer, positions in enumerate(sets):
        before = native.layer(ctx_of(llm), layer).n_kept
        assert native.keep(ctx_of(llm), 0, layer, np.array(positions)) == before - len(positions)
    assert kept(llm) == sets


# -- against the NumPy model -------------------------------------------------------------------------------------------


Models = Callable[[str], reference.LlamaReference]


@pytest.fixture(scope="module")
def models(tiny: Callable[[str], Path]) -> Models:
    """A NumPy model that has read PROMPT."""

    @functools.cache
    def read(name: str) -> reference.LlamaReference:
        model = reference.LlamaReference(tiny(name))
        model.read(PROMPT)
        return model

    return lambda name: read(name).copy()


@pytest.fixture(scope="module")
def expected_logits(models: Models) -> Callable[[str, bool], npt.NDArray[np.float64]]:
    """Of a NumPy model after PROMPT, for DECODED: whole, or evicted by hand."""

    @functools.cache
    def expected(name: str, whole: bool) -> npt.NDArray[np.float64]:
        return decode_masked(models(name), [list(range(N_PROMPT))] * 4 if whole else by_hand(4))

    return expected


def error(actual: npt.NDArray[np.floating], expected: npt.NDArray[np.floating]) -> float:
    """The largest difference, in standard deviations of the logits."""
    return float(np.abs(actual - expected).max() / expected.std())


def decode_masked(model: reference.LlamaReference, sets: list[list[int]]) -> npt.NDArray[np.float64]:
    for layer, positions in enumerate(sets):
        model.keep(layer, positions)
    return np.concatenate([model.read([token]) for token in DECODED])


# (flash attention, cache type) -> tolerance. Single precision throughout without flash attention, which rounds the keys
# and values to f16 whatever the cache is, and adds up in f16 too.
TOLERANCES = {(False, "f32"): 5e-5, (False, "f16"): 5e-3, (True, "f32"): 2e-2, (True, "f16"): 2e-2}

SINGLE: dict[str, Any] = {"type_k": F32, "type_v": F32, "flash_attn": False}


@pytest.mark.parametrize(
    ("flash_attn", "cache"), TOLERANCES, ids=[f"{'flash' if f else 'plain'}-{c}" for f, c in TOLERANCES]
)
@pytest.mark.parametrize("model", ["gqa", "mha", "gqa64"])
def test_logits_are_those_of_the_masked_model(
    tiny: Callable[[str], Path],
    expected_logits: Callable[[str, bool], npt.NDArray[np.float64]],
    model: str,
    flash_attn: bool,
    cache: str,
) -> None:
    llm = load(tiny(model), ReFreeKV(), flash_attn=flash_attn, type_k=CACHE_TYPES[cache], type_v=CACHE_TYPES[cache])
    llm.eval(PROMPT)
    evict(llm, by_hand(4))
    expected = expected_logits(model, False)
    tolerance = TOLERANCES[flash_attn, cache]
    assert error(feed(llm, DECODED), expected) < tolerance
    # without the masks the model says something else altogether
    assert error(expected_logits(model, True), expected) > 5 * tolerance


@pytest.mark.parametrize("name", POLICIES)
def test_logits_after_a_policy_are_those_of_the_masked_model(tiny_model: Path, models: Models, name: str) -> None:
    llm = load(tiny_model, POLICIES[name], **SINGLE)
    llm.eval(PROMPT)
    assert llm.prune_kv() > 0
    sets = kept(llm)
    actual = feed(llm, DECODED)
    expected = decode_masked(models("gqa"), sets)
    assert error(actual, expected) < TOLERANCES[False, "f32"]


def test_a_batch_after_an_eviction(tiny_model: Path, models: Models) -> None:
    # causal among themselves, and each sees what is kept of the prompt: in batches of 24, the last of 16
    llm = load(tiny_model, ReFreeKV(), **SINGLE, n_ubatch=24)
    llm.eval(PROMPT)
    sets = by_hand(4)
    evict(llm, sets)
    llm.eval(DECODED)
    expected = decode_masked(models("gqa"), sets)
    assert error(logits(llm), expected[-1]) < TOLERANCES[False, "f32"]


def test_a_second_eviction(tiny_model: Path, models: Models) -> None:
    # of the prompt and of what was decoded since
    model = models("gqa")
    llm = load(tiny_model, ReFreeKV(), **SINGLE)
    llm.eval(PROMPT)
    evict(llm, by_hand(4))
    feed(llm, DECODED)
    decode_masked(model, by_hand(4))

    n_tokens = N_PROMPT + N_DECODED
    sets = [
        [*positions[::2], *range(N_PROMPT + layer, n_tokens, layer + 2)] for layer, positions in enumerate(by_hand(4))
    ]
    evict(llm, sets)
    assert error(feed(llm, DECODED), decode_masked(model, sets)) < TOLERANCES[False, "f32"]


def test_a_layer_with_nothing_left(tiny_model: Path, models: Models) -> None:
    llm = load(tiny_model, ReFreeKV(), **SINGLE)
    llm.eval(PROMPT)
    sets = [list(range(N_PROMPT)), [], list(range(N_PROMPT)), []]
    evict(llm, sets)
    assert error(feed(llm, DECODED), decode_masked(models("gqa"), sets)) < TOLERANCES[False, "f32"]


# -- against another way of doing it -----------------------------------------------------------------------------------

# K type, V type, flash attention: a quantised V needs it
CACHES = {
    **{
        f"{name}-plain": (kind, F16 if kind > F16 and name != "bf16" else kind, False)
        for name, kind in CACHE_TYPES.items()
    },
    **{f"{name}-flash": (kind, kind, True) for name, kind in CACHE_TYPES.items()},
}


# few, so that the slow types take no time; the largest layer still outgrows its 256 cells again while decoding
N_SHORT = 400

Run = Callable[..., npt.NDArray[np.float32]]


@pytest.fixture(scope="module")
def decoded(tiny: Callable[[str], Path]) -> Run:
    """The logits for DECODED with some caches, after an eviction by hand unless the cache is to stay whole: those of
    each token, which is read by itself; or those after each batch of some tokens."""

    @functools.cache
    def run(caches: str, policy: Policy, *, whole: bool = False, n_batch: int = 1) -> npt.NDArray[np.float32]:
        type_k, type_v, flash_attn = CACHES[caches]
        llm = load(tiny("gqa64"), policy, type_k=type_k, type_v=type_v, flash_attn=flash_attn, n_ctx=512)
        llm.eval(PROMPT[:N_SHORT])
        if not whole:
            evict(llm, by_hand(4, N_SHORT))
            assert llm.kv_stats.cells_capacity == (256,) * 4 or getattr(policy, "mask_only", False)
        if n_batch > 1:
            res = []
            for i in range(0, N_DECODED, n_batch):
                llm.eval(DECODED[i : i + n_batch])
                res.append(logits(llm))
            return np.array(res)
        res = feed(llm, DECODED)
        if not whole:
            assert llm.kv_stats.cells_capacity[3] == 512
        return res

    return run


@pytest.mark.parametrize("caches", CACHES)
def test_rows_moved_by_a_graph_are_bit_identical(decoded: Run, caches: str) -> None:
    by_graph = decoded(caches, Debug(policy=ReFreeKV(), by_graph=True))
    np.testing.assert_array_equal(decoded(caches, ReFreeKV()), by_graph)


@pytest.mark.parametrize("caches", CACHES)
def test_masked_in_place_is_the_same_as_moved(decoded: Run, caches: str) -> None:
    masked = decoded(caches, Debug(policy=ReFreeKV(), mask_only=True))
    # the sums are over the same rows, but not in the same order; attention weights are rounded to f16 or less before
    # they meet values that are no f32
    assert error(decoded(caches, ReFreeKV()), masked) < (1e-5 if caches == "f32-plain" else 2e-3)


@pytest.mark.parametrize("caches", CACHES)
def test_a_policy_that_has_evicted_nothing(decoded: Run, caches: str) -> None:
    """Batches of 64 tokens are read by upstream's operations, bit for bit as with the full cache. Smaller ones are
    computed by a kernel of our own, which rounds less than upstream's operations do."""
    batches = decoded(caches, Full(), whole=True, n_batch=N_DECODED)
    np.testing.assert_array_equal(batches, decoded(caches, ReFreeKV(), whole=True, n_batch=N_DECODED))

    for n_batch in (8, 1):
        full = decoded(caches, Full(), whole=True, n_batch=n_batch)
        ours = decoded(caches, ReFreeKV(), whole=True, n_batch=n_batch)
        assert error(full, ours) < (1e-5 if caches == "f32-plain" else 2e-2)
    # what is compared above does depend on what is evicted
    assert error(full, decoded(caches, ReFreeKV())) > 0.05


@pytest.mark.parametrize("debug", [{"mask_only": True}, {"by_graph": True}], ids=str)
@pytest.mark.parametrize("name", ["refreekv", "paper"])
def test_policies_choose_the_same_in_debug_modes(tiny_model: Path, name: str, debug: dict[str, bool]) -> None:
    res = []
    for policy in (POLICIES[name], Debug(policy=POLICIES[name], **debug)):
        llm = load(tiny_model, policy)
        llm.eval(PROMPT)
        n_evicted = llm.prune_kv()
        res.append((n_evicted, kept(llm)))
    assert res[0] == res[1]


def test_logits_stay_readable_over_an_eviction(tiny_model: Path) -> None:
    # the first token is sampled after the cache was pruned, from logits of before
    llm = load(tiny_model, ReFreeKV())
    llm.eval(PROMPT)
    before = logits(llm)
    assert llm.prune_kv() > 0
    np.testing.assert_array_equal(before, logits(llm))
