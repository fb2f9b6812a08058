"""`kv_guard`: the first token of an answer is read on the whole cache and on the pruned one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from policies import POLICIES
from support import feed, kept, load
from tiny import random_tokens

from refreekv_cpp import Llama, Policy, PolicyError, PythonPolicy, ReFreeKV, Streaming, UnsupportedModelError, native
from refreekv_cpp.divergence import kl, log_softmax

PROMPT = random_tokens(1500)
QUESTION = random_tokens(60, seed=2)
POLICY = Streaming(budget=0.3, n_min=0)
TIGHT, LOOSE = 1e-9, 1e9


@pytest.fixture(autouse=True)
def all_writes_work() -> Iterator[None]:
    yield
    native.fail_cold(0)


def answer(llm: Llama, prompt: list[int] = PROMPT, n_tokens: int = 6) -> list[int]:
    return list(itertools.islice(llm.generate(prompt, temp=0.0), n_tokens))


def measured(path: Path, policy: Policy) -> float:
    """The divergence that the guard is to find, with nothing but `eval` and `prune_kv`."""
    full, pruned = load(path, "full", kv_elastic=True), load(path, policy)
    for llm in (full, pruned):
        llm.eval(PROMPT)
    pruned.prune_kv()
    token = answer(load(path, "full"), n_tokens=1)
    return kl(log_softmax(feed(full, token)[0]), log_softmax(feed(pruned, token)[0]))


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "full"])
def test_a_guard_that_lets_everything_pass_changes_nothing(tiny_model: Path, name: str) -> None:
    free, llm = load(tiny_model, POLICIES[name]), load(tiny_model, POLICIES[name], kv_guard=LOOSE)
    assert answer(llm) == answer(free)
    assert kept(llm) == kept(free)
    assert llm.kv_stats.n_guarded == 0
    assert free.kv_stats.divergence is None


def test_it_measures_what_the_pruning_did(tiny_model: Path) -> None:
    llm = load(tiny_model, POLICY, kv_guard=LOOSE)
    answer(llm)
    assert llm.kv_stats.divergence == pytest.approx(measured(tiny_model, POLICY), rel=1e-3)
    assert llm.kv_stats.divergence > 1e-6


def test_a_tight_one_keeps_everything_in_the_end(tiny_model: Path) -> None:
    llm = load(tiny_model, POLICY, kv_guard=TIGHT)
    assert answer(llm) == answer(load(tiny_model, "full"))
    stats = llm.kv_stats
    assert (stats.budget, stats.n_guarded, stats.bytes_cold) == (1.0, 2, stats.bytes_cold)
    assert stats.divergence == pytest.approx(0, abs=1e-9)


def test_it_tries_a_gentler_policy_first(tiny_model: Path) -> None:
    gentler = replace(POLICY, budget=0.65)
    assert POLICY.gentler() == gentler
    first, second = measured(tiny_model, POLICY), measured(tiny_model, gentler)
    assert second < first
    llm = load(tiny_model, POLICY, kv_guard=(first + second) / 2)
    other = load(tiny_model, gentler)
    assert answer(llm) == answer(other)
    assert kept(llm) == kept(other)
    assert llm.kv_stats.n_guarded == 1
    assert llm.kv_stats.divergence == pytest.approx(second, rel=1e-3)


@dataclass(frozen=True, kw_only=True)
class Halves(Streaming):
    """As one without a gentler form."""

    def gentler(self) -> Any:
        return None


def test_a_policy_without_a_gentler_form(tiny_model: Path) -> None:
    llm = load(tiny_model, Halves(budget=0.3, n_min=0), kv_guard=TIGHT)
    answer(llm)
    assert (llm.kv_stats.budget, llm.kv_stats.n_guarded) == (1.0, 1)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "full"])
def test_gentler_keeps_more(tiny_model: Path, name: str) -> None:
    policy = POLICIES[name]
    gentler = policy.gentler()
    assert gentler is not None
    budgets = []
    for each in (policy, gentler):
        llm = load(tiny_model, each)
        llm.eval(PROMPT)
        llm.prune_kv()
        budgets.append(llm.kv_stats.budget)
    assert budgets[0] < budgets[1] <= 1


def test_the_next_turn(tiny_model: Path) -> None:
    llm, full = load(tiny_model, POLICY, kv_guard=TIGHT), load(tiny_model, "full")
    first, expected = answer(llm), answer(full)
    assert first == expected
    assert answer(llm, [*PROMPT, *first, *QUESTION]) == answer(full, [*PROMPT, *expected, *QUESTION])
    assert llm.kv_stats.n_guarded == 4


def test_rows_that_cannot_come_back_stay_away(tiny_model: Path) -> None:
    llm, free = load(tiny_model, POLICY, kv_guard=TIGHT), load(tiny_model, POLICY)
    native.fail_cold(1)
    assert answer(llm) == answer(free)
    assert kept(llm) == kept(free)
    assert (llm.kv_stats.n_guarded, llm.kv_stats.cold_full) == (0, True)


def test_below_n_min_nothing_is_read_twice(tiny_model: Path) -> None:
    llm = load(tiny_model, Streaming(budget=0.3), kv_guard=TIGHT)
    answer(llm, PROMPT[:100])
    assert llm.kv_stats.divergence is None


def test_a_whole_cache_without_room_for_a_token_is_pruned_unguarded(tiny_model: Path) -> None:
    limit = 1536 * load(tiny_model, POLICY).kv_stats.bytes_per_token
    prompt = random_tokens(1536)
    llm, free = load(tiny_model, POLICY, kv_guard=TIGHT, kv_memory_limit=limit), load(tiny_model, POLICY)
    assert answer(llm, prompt) == answer(free, prompt)
    assert (llm.kv_stats.divergence, llm.kv_stats.n_guarded) == (None, 0)
    assert llm.kv_stats.budget < 1


@dataclass(frozen=True, kw_only=True)
class FailsOnce(PythonPolicy):
    def select(self, attention: Any, positions: Any, layer: int) -> Any:
        if FAILURES:
            raise FAILURES.pop()
        return np.arange(len(positions)) >= len(positions) - 512


FAILURES: list[Exception] = []


def test_a_pruning_that_fails_leaves_no_logits_of_another_token(tiny_model: Path) -> None:
    llm, other = (load(tiny_model, FailsOnce(n_min=0), kv_guard=LOOSE) for _ in range(2))
    FAILURES.append(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        answer(llm)
    assert answer(llm) == answer(other)


def test_the_divergence_is_that_of_the_last_answer(tiny_model: Path) -> None:
    llm = load(tiny_model, POLICY, kv_guard=LOOSE, kv_prune_every=4)
    answer(llm, n_tokens=12)
    assert llm.kv_stats.n_prunes > 1
    assert llm.kv_stats.divergence is not None
    llm.reset()
    assert llm.kv_stats.divergence is None


@pytest.mark.parametrize("model", ["jamba (hybrid)", "lfm2 (hybrid)"])
def test_what_cannot_take_a_token_back_is_refused(tiny: Callable[[str], Path], model: str) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot take a token back"):
        load(tiny(model), POLICY, kv_guard=LOOSE)
    answer(load(tiny(model), POLICY))


@pytest.mark.parametrize("limit", [0, -1, True, "much", float("nan")])
def test_what_is_no_number_of_nats_is_refused(limit: Any) -> None:
    with pytest.raises(PolicyError, match=r"kv_guard=.*valid are"):
        Llama("no such model", kv_policy="refreekv", kv_guard=limit)


@pytest.mark.parametrize("evicted", ["drop", "recompute"])
def test_it_needs_what_was_evicted(evicted: Any) -> None:
    with pytest.raises(PolicyError, match="needs kv_evicted='restore'"):
        Llama("no such model", kv_policy="refreekv", kv_guard=0.1, kv_evicted=evicted)


def test_other_parameters_have_to_fit_the_context(tiny_model: Path) -> None:
    llm = load(tiny_model, ReFreeKV(n_window=32, n_min=0))
    llm.eval(PROMPT)
    for other in (POLICY, ReFreeKV(n_window=64)):
        with pytest.raises(PolicyError, match="n_window of 32 or less"):
            native.prune(llm._ctx.ctx, 0, native.make_params(**(other.native_options() or {})))
    assert np.all(np.array([len(layer) for layer in kept(llm)]) == len(PROMPT))
