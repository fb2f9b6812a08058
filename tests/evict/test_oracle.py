"""Native kept sets are those of the method's definition (reference.py), on given attention and on a model's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import reference
from by_definition import CONTEXTS, MODEL_TOLERANCE, attention_of, by_graph
from policies import COMBINATIONS, POLICIES, PRESETS, Debug
from support import F16, Q8_0, ctx_of, load
from tiny import random_tokens

from refreekv_cpp import H2O, Policy, PyramidKV, ReFreeKV, SnapKV, Streaming, TopP, native

# -- the comparison ----------------------------------------------------------------------------------------------------


def assert_selected(kept: npt.NDArray[np.bool_], expected: reference.Selection, tolerance: float) -> None:
    """The kept set is the expected one; where a decision depends on less than the tolerance, it may fall either way."""
    n_keep = int(kept.sum())
    if n_keep == expected.n_keep and np.flatnonzero(kept).tolist() == expected.kept:
        return

    assert n_keep in expected.counts
    assert n_keep == expected.n_keep or expected.losses is not None, "a fixed budget is exact"
    low, high = sorted((n_keep, expected.n_keep))
    for count in expected.counts:
        if low <= count < high:
            assert expected.losses[count] == pytest.approx(expected.threshold, abs=tolerance), (
                f"{n_keep} cells are kept, {expected.n_keep} expected"
            )

    swapped = set(np.flatnonzero(kept).tolist()) ^ set(expected.order[:n_keep])
    if swapped:
        assert expected.scores is not None, f"other cells than expected: {sorted(swapped)}"
        last = expected.scores[expected.order[n_keep - 1]]
        for cell in swapped:
            assert expected.scores[cell] == pytest.approx(last, rel=tolerance), f"cell {cell} does not belong here"


def test_the_comparison_notices_what_is_wrong() -> None:
    attention = random_attention(0)
    policy = COMBINATIONS["score-mean-mass-sinks-out"]
    expected = reference.select(policy, attention, 1)
    right = np.zeros(attention.shape[2], dtype=bool)
    right[expected.kept] = True
    assert_selected(right, expected, 1e-5)

    one_more, one_less, another = right.copy(), right.copy(), right.copy()
    one_more[expected.order[expected.n_keep]] = True
    one_less[expected.order[expected.n_keep - 1]] = False
    another[expected.order[expected.n_keep - 1]] = False
    another[expected.order[-1]] = True
    for wrong in (one_more, one_less, another):
        with pytest.raises(AssertionError):
            assert_selected(wrong, expected, 1e-5)


# -- on attention that is given ----------------------------------------------------------------------------------------

# native works on the same numbers as the reference, in double precision; only its sums are rounded to float
TOLERANCE = 1e-5


def random_attention(seed: int, *, n_head: int = 3, n_rows: int = 64, n_cells: int = 700) -> npt.NDArray[np.float32]:
    """Rows as a softmax leaves them: causal, with heads that differ in sharpness, in locality and in their sinks."""
    rng = np.random.default_rng(seed)
    rows = min(n_rows, n_cells)
    query_pos = np.arange(n_cells - rows, n_cells)
    distance = query_pos[:, None] - np.arange(n_cells)[None, :]
    heads = []
    for head in range(n_head):
        content = rng.standard_normal((rows, 8)) @ rng.standard_normal((8, n_cells)) * rng.uniform(0.1, 1.0)
        logits = content - distance * rng.choice([0, 0.002, 0.01])
        logits[:, :4] += head * 3  # the last head looks at hardly anything else
        logits[distance < 0] = -np.inf
        heads.append(reference.softmax(logits))
    return np.array(heads, dtype=np.float32)


def native_select(
    policy: Policy, attention: npt.NDArray[np.float32], n_block: int, **layers: int
) -> npt.NDArray[np.bool_]:
    options = policy.native_options()
    assert options is not None
    return native.select(native.make_params(**options, n_block=n_block), attention, **layers)


@pytest.mark.parametrize("n_block", [1, 32, 256])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_combination_selects_by_definition(name: str, n_block: int) -> None:
    n_kept = set()
    for seed, threshold in ((1, 0.003), (2, 0.03), (3, 0.1), (4, 0.3), (5, 0.6), (6, 0.9)):
        policy = replace(COMBINATIONS[name], threshold=threshold)
        attention = random_attention(seed)
        expected = reference.select(policy, attention, n_block)
        assert_selected(native_select(policy, attention, n_block), expected, TOLERANCE)
        n_kept.add(expected.n_keep)
    # of the three counts that blocks of 256 leave, the strictest rules allow one
    assert len(n_kept) > 1 or n_block == 256, "the thresholds make no difference: nothing was tested"


@pytest.mark.parametrize("n_block", [1, 32, 256])
@pytest.mark.parametrize(
    "policy", [*PRESETS.values(), *POLICIES.values()], ids=[*PRESETS, *(f"{n}+" for n in POLICIES)]
)
def test_presets_select_by_definition(policy: Policy, n_block: int) -> None:
    for seed in range(3):
        attention = random_attention(seed, n_rows=getattr(policy, "n_window", 1))
        expected = reference.select(policy, attention, n_block, seed, 3)
        assert_selected(native_select(policy, attention, n_block, layer=seed, n_layer=3), expected, TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {"n_sink": 0},
        {"n_sink": 0, "n_recent": 0},
        {"n_sink": 64, "n_recent": 200},
        {"n_sink": 400, "n_recent": 400},  # they overlap, and leave nothing to choose
        {"n_pool": 1},
        {"n_pool": 1601},  # wider than the row
        {"threshold": 0.0},
        {"threshold": 1.0},
        {"mass_floor": 0.0},
        {"mass_floor": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "name", ["position-mean-norm-sinks-in", "position-worst-mass-sinks-out", "score-worst-mass-sinks-out"]
)
def test_options_at_their_limits(name: str, options: dict[str, float]) -> None:
    policy = replace(COMBINATIONS[name], **{"threshold": 0.3, **options})
    attention = random_attention(7)
    for n_block in (1, 256):
        expected = reference.select(policy, attention, n_block)
        assert_selected(native_select(policy, attention, n_block), expected, TOLERANCE)


@pytest.mark.parametrize("n_cells", [1, 2, 4, 5, 36, 37, 63, 64, 65, 255, 256, 257, 511, 512, 513])
@pytest.mark.parametrize("name", POLICIES)
def test_prompts_of_any_length(name: str, n_cells: int) -> None:
    attention = random_attention(n_cells, n_cells=n_cells)
    for n_block in (1, 256):
        expected = reference.select(POLICIES[name], attention, n_block)
        assert_selected(native_select(POLICIES[name], attention, n_block), expected, TOLERANCE)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_rows_that_look_at_the_sinks_only(name: str) -> None:
    # what the sinks leave underflows to nothing: nothing is lost by evicting the rest
    attention = np.zeros((2, 64, 600), dtype=np.float32)
    attention[:, :, :4] = 0.25
    policy = COMBINATIONS[name]
    expected = reference.select(policy, attention, 1)
    assert_selected(native_select(policy, attention, 1), expected, TOLERANCE)
    n_first = 5 if policy.ranking == "position" else 36
    assert expected.n_keep == n_first


@pytest.mark.parametrize("n_block", [1, 256])
@pytest.mark.parametrize("budget", [0.001, 0.07, 0.25, 0.4, 0.5, 1.0, 2, 300, 5000])
@pytest.mark.parametrize("kind", [Streaming, SnapKV, H2O, PyramidKV], ids=lambda kind: kind.__name__)
def test_fixed_budgets_are_kept(kind: type[Policy], budget: float, n_block: int) -> None:
    policy = kind(budget=budget)
    attention = random_attention(0, n_rows=32)
    expected = reference.select(policy, attention, n_block)
    kept = native_select(policy, attention, n_block)
    assert_selected(kept, expected, TOLERANCE)
    n_kept = {0.07: 49, 0.25: 175, 0.4: 280, 0.5: 350, 1.0: 700, 300: 300, 5000: 700}
    if n_block == 1 and budget in n_kept:  # below these, what always stays is more
        assert kept.sum() == n_kept[budget]


@pytest.mark.parametrize("beta", [1, 2, 20, 1000])
@pytest.mark.parametrize("budget", [0.02, 0.1, 0.4, 0.5, 0.51, 0.9, 1.0, 40])
def test_pyramids_have_the_budget_as_their_mean(budget: float, beta: int) -> None:
    policy = PyramidKV(budget=budget, beta=beta)
    n_layer = 12
    n_kept = []
    for layer in range(n_layer):
        attention = random_attention(layer, n_rows=32)
        expected = reference.select(policy, attention, 1, layer, n_layer)
        kept = native_select(policy, attention, 1, layer=layer, n_layer=n_layer)
        assert_selected(kept, expected, TOLERANCE)
        n_kept.append(int(kept.sum()))
    mean = max(32, 700 * budget if budget <= 1 else budget)
    assert mean <= np.mean(n_kept) < mean + 1  # each layer's is rounded up
    steps = -np.diff(n_kept)
    assert min(steps) >= 0
    assert max(steps) - min(steps) <= 1
    if beta == 1:
        assert max(n_kept) == min(n_kept)
    elif budget == 0.4:
        slope = min(2 * 248 - 248 / beta, 668)  # 668 cells lie before the window, 248 of the 280 are for them
        assert n_kept[0] == 32 + math.ceil(slope)
        assert n_kept[-1] == 32 + math.ceil(2 * 248 - slope)


@pytest.mark.parametrize("n_block", [1, 256])
@pytest.mark.parametrize("p", [1e-6, 0.2, 0.5, 0.9, 0.99, 1.0])
def test_the_nucleus_has_its_mass(p: float, n_block: int) -> None:
    policy = TopP(p=p)
    for seed in range(3):
        attention = random_attention(seed, n_rows=32)
        expected = reference.select(policy, attention, n_block)
        kept = native_select(policy, attention, n_block)
        assert_selected(kept, expected, TOLERANCE)
        assert attention[:, :, kept].sum(axis=2).mean() >= p - 1e-6
        assert kept.all() == (p == 1) or n_block > 1


def test_attention_that_the_models_own_sinks_take_does_not_count() -> None:
    # the rows of such a model sum to less than 1
    attention = random_attention(5, n_rows=32)
    np.testing.assert_array_equal(native_select(TopP(), attention / 8, 1), native_select(TopP(), attention, 1))


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_attention_within_the_window_is_not_pooled_into_the_cells_before(pooling: str) -> None:
    # the window's first cell is looked at most of all; its neighbours before the window are not
    attention = np.full((2, 32, 400), 1e-4, dtype=np.float32)
    attention[:, :, 368] = 0.9
    attention[:, :, 100] = 0.01
    kept = np.flatnonzero(native_select(SnapKV(budget=39, pooling=pooling), attention, 1)).tolist()
    assert kept == [*range(97, 104), *range(368, 400)]


def test_heavy_hitters_of_the_recent_half_do_not_count_twice() -> None:
    attention = np.full((1, 4, 100), 1e-3, dtype=np.float32)
    attention[:, :, [10, 20, 95]] = 0.2
    kept = np.flatnonzero(native_select(H2O(budget=12), attention, 1)).tolist()
    assert kept == [0, 1, 2, 3, 10, 20, *range(94, 100)]


def test_equal_scores_keep_the_earlier_cell() -> None:
    # one attended cell in the middle: the max-pool spreads its score over 31 cells, all of them alike
    attention = np.full((1, 1, 200), 1e-6, dtype=np.float32)
    attention[0, 0, 100] = 1 - 199e-6
    policy = ReFreeKV(rows="last", threshold=0.5, n_pool=31, n_recent=0)
    kept = np.flatnonzero(native_select(policy, attention, 1)).tolist()
    # from the left edge of the pooled region up to the cell itself
    assert kept == [0, 1, 2, 3, *range(85, 101)]
    assert kept == reference.select(policy, attention, 1).kept


# -- on a model's own attention ----------------------------------------------------------------------------------------


def assert_prunes_by_definition(llm, policy: Policy, type_k: int) -> list[int]:
    """Prunes; returns how many cells each layer kept."""
    n_layer = native.stats(ctx_of(llm)).n_layer
    before = [native.kept(ctx_of(llm), 0, layer) for layer in range(n_layer)]
    expected = [
        reference.select(policy, attention_of(llm, policy, layer, type_k), 256, layer, n_layer)
        for layer in range(n_layer)
    ]

    n_evicted = llm.prune_kv()

    looks = bool((policy.native_options() or {}).get("n_window"))
    assert (llm.kv_stats.bytes_read > 0) == (looks and by_graph(llm)), "the other way was to be tested"

    n_full_layers = getattr(policy, "n_full_layers", 0)
    n_kept = []
    for layer in range(n_layer):
        kept = np.isin(before[layer], native.kept(ctx_of(llm), 0, layer))
        n_kept.append(int(kept.sum()))
        if layer < n_full_layers:
            assert kept.all()
        else:
            # a number of a query that lies in the middle of two of q8_0's may be rounded either way
            rounded = type_k == Q8_0 and by_graph(llm)
            assert_selected(kept, expected[layer], 1e-3 if rounded else MODEL_TOLERANCE)
    assert n_evicted == sum(map(len, before)) - sum(n_kept)
    return n_kept


@pytest.mark.parametrize("graph", [False, True], ids=["kernel", "graph"])
@pytest.mark.parametrize(
    ("name", "context"),
    [(name, context) for name in POLICIES for context in CONTEXTS if name in PRESETS or context == "gqa-f16-plain"],
)
def test_a_model_is_pruned_by_definition(tiny: Callable[[str], Path], name: str, context: str, graph: bool) -> None:
    model, type_k, flash_attn, n_prompt = CONTEXTS[context]
    policy = Debug(policy=POLICIES[name], by_graph=True) if graph else POLICIES[name]
    llm = load(tiny(model), policy, type_k=type_k, flash_attn=flash_attn)
    llm.eval(random_tokens(n_prompt))
    n_kept = assert_prunes_by_definition(llm, POLICIES[name], type_k)
    assert min(n_kept) < n_prompt, "nothing was evicted: nothing was tested"


@pytest.mark.parametrize("name", POLICIES)
def test_a_pruned_cache_is_pruned_again_by_definition(tiny_model: Path, name: str) -> None:
    policy = replace(POLICIES[name], n_min=0)
    llm = load(tiny_model, policy)
    llm.eval(random_tokens(1100))
    llm.prune_kv()
    llm.eval(random_tokens(601, seed=1)[1:])
    n_kept = assert_prunes_by_definition(llm, policy, F16)
    assert len(set(n_kept)) > 1 or name in ("streaming", "snapkv", "snapkv-mean", "h2o"), "layers that need the same"


@pytest.mark.parametrize("graph", [False, True], ids=["kernel", "graph"])
@pytest.mark.parametrize("policy", [ReFreeKV(n_window=256, threshold=0.6), H2O()], ids=["max", "mean"])
def test_a_layer_too_large_for_one_piece(tiny: Callable[[str], Path], policy: Policy, graph: bool) -> None:
    # 40 heads of 256 queries over 2048 cells: 80 MiB of attention, which goes slice by slice
    llm = load(tiny("many-heads"), Debug(policy=policy, by_graph=True) if graph else policy)
    llm.eval(random_tokens(1800))
    assert min(assert_prunes_by_definition(llm, policy, F16)) < 1800


@pytest.mark.parametrize("n_min", [1500, 1501])
def test_prompts_shorter_than_n_min_are_left_whole(tiny_model: Path, n_min: int) -> None:
    llm = load(tiny_model, Streaming(budget=0.5, n_min=n_min))
    llm.eval(random_tokens(1500))
    assert (llm.prune_kv() > 0) == (n_min <= 1500)


@pytest.fixture(scope="module")
def model_that_has_read(tiny_model: Path) -> tuple[int, reference.LlamaReference]:
    model = reference.LlamaReference(tiny_model)
    model.read(random_tokens(300))
    return 300, model


@pytest.mark.parametrize("n_ubatch", [512, 100, 64, 48, 1])
@pytest.mark.parametrize("n_window", [1, 64, 256])
def test_the_metric_reads_the_models_own_queries_and_keys(
    tiny_model: Path, model_that_has_read: tuple[int, reference.LlamaReference], n_window: int, n_ubatch: int
) -> None:
    # however the prompt falls into batches, the ring has its last queries and the cache its keys, after RoPE
    n_tokens, model = model_that_has_read
    llm = load(tiny_model, ReFreeKV(n_window=n_window), n_ubatch=n_ubatch)
    llm.eval(random_tokens(n_tokens))
    for layer in range(model.n_layer):
        queries, query_pos = native.read_queries(ctx_of(llm), 0, layer)
        assert query_pos.tolist() == list(range(n_tokens - n_window, n_tokens))
        np.testing.assert_allclose(queries, model.last_queries[layer][-n_window:], atol=0.02)

        keys, key_pos = native.read_keys(ctx_of(llm), 0, layer)
        assert key_pos.tolist() == list(range(n_tokens))
        np.testing.assert_allclose(keys, model.keys[layer], atol=0.02)


# -- on a real model ---------------------------------------------------------------------------------------------------

_TEXT = " ".join(
    f"Entry {i}: on day {37 * i % 365} the {thing} of pier {i % 11} weighed {i * i % 997} stone, sold to {buyer}."
    for i, (thing, buyer) in enumerate(
        (thing, buyer)
        for buyer in ("the harbour master", "a widow from Leith", "nobody", "the crew of the Albatross")
        for thing in ("rope", "anchor", "herring", "lantern", "copper", "salt", "flour", "timber", "wool", "bell")
    )
)


@pytest.mark.model
@pytest.mark.parametrize(("name", "flash_attn"), [*((name, False) for name in PRESETS), ("refreekv", True)])
def test_a_real_model_is_pruned_by_definition(default_model: Path, name: str, flash_attn: bool) -> None:
    llm = load(default_model, PRESETS[name], flash_attn=flash_attn, n_threads=2, n_threads_batch=2)
    llm.eval(llm.tokenize(_TEXT.encode())[:1200])
    assert llm.n_tokens > 1100
    n_kept = assert_prunes_by_definition(llm, PRESETS[name], F16)
    assert min(n_kept) < llm.n_tokens
