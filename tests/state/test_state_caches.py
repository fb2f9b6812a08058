"""States, and the caches of them that llama-cpp-python's completions use."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from support import F32, load
from tiny import random_tokens

from refreekv_cpp import CacheStateError, Llama, ReFreeKV

POLICY = ReFreeKV(n_min=0)
PROMPT = random_tokens(700)

CACHES: dict[str, Callable[[Path], Any]] = {
    "ram": lambda _: llama_cpp.LlamaRAMCache(),
    "disk": lambda folder: llama_cpp.LlamaDiskCache(str(folder)),
}


def answer(llm: Llama, prompt: list[int]) -> str:
    response: Any = llm.create_completion(prompt, max_tokens=4, temperature=0.0, logit_bias={"100": 50.0})
    return response["choices"][0]["text"]


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(
    ("filled", "used"),
    [
        ({"policy": "full"}, {"policy": POLICY}),
        ({"policy": POLICY}, {"policy": "full"}),
        ({"policy": POLICY}, {"policy": POLICY, "type_k": F32, "type_v": F32}),
        ({"policy": "full"}, {"policy": "full", "type_k": F32, "type_v": F32}),
        ({"policy": POLICY, "n_ctx": 2048}, {"policy": POLICY, "n_ctx": 512}),
        ({"policy": "full", "n_ctx": 2048}, {"policy": "full", "n_ctx": 512}),
    ],
    ids=["policy", "no policy", "type", "type, full", "n_ctx", "n_ctx, full"],
)
def test_an_entry_that_does_not_fit_is_a_miss(
    tiny_model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    filled: dict[str, Any],
    used: dict[str, Any],
) -> None:
    # once CacheStateError, or another one, came out of the completion
    cache = CACHES[kind](tmp_path)
    llm = load(tiny_model, **filled)
    llm.set_cache(cache)
    answer(llm, PROMPT)

    llm, fresh = load(tiny_model, **used), load(tiny_model, **used)
    llm.set_cache(cache)
    assert llm.cache is cache
    prompt = PROMPT[:400]
    with caplog.at_level(logging.WARNING, "refreekv_cpp"):
        assert answer(llm, prompt) == answer(fresh, prompt)
        llm.reset()
        assert answer(llm, prompt) == answer(fresh, prompt)
    assert [record.message[:46] for record in caplog.records] == ["an entry of the cache of states does not fit, "]
    with pytest.raises(CacheStateError):  # asked for by the program, it stays an error
        llm.load_state(load_state_of(tiny_model, filled))


def load_state_of(path: Path, options: dict[str, Any]) -> llama_cpp.LlamaState:
    llm = load(path, **options)
    llm.eval(PROMPT)
    return llm.save_state()


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("policy", [POLICY, "full"], ids=["refreekv", "full"])
def test_entries_that_fit_are_used_and_are_no_larger_than_they_say(
    tiny_model: Path, tmp_path: Path, kind: str, policy: Any
) -> None:
    cache = CACHES[kind](tmp_path)
    llm = load(tiny_model, policy)
    llm.set_cache(cache)
    answer(llm, PROMPT)
    assert PROMPT in cache
    other = load(tiny_model, policy, verbose=False)
    other.set_cache(cache)
    loaded = []
    load_state = other.load_state
    other.load_state = lambda state: (loaded.append(state), load_state(state))  # type: ignore[method-assign]
    assert answer(other, PROMPT) == answer(llm, PROMPT)
    assert len(loaded) == 1
    # once n_batch x n_vocab floats were added to each
    assert len(pickle.dumps(loaded[0])) < loaded[0].llama_state_size + 4 * 2048 + 4096


@pytest.mark.parametrize("policy", [POLICY, "full"], ids=["refreekv", "full"])
def test_states_go_to_upstream_and_back(tiny_model: Path, policy: Any) -> None:
    llm = load(tiny_model, policy)
    llm.eval(PROMPT)
    state = pickle.loads(pickle.dumps(llm.save_state()))
    assert type(state) is llama_cpp.LlamaState
    assert state.scores.nbytes <= 64

    # upstream's code takes the state, and we take one that upstream has saved
    reader = load(tiny_model, policy)
    llama_cpp.Llama.load_state.__get__(reader)(state)
    assert reader.n_tokens == 700
    old = llama_cpp.Llama.save_state.__get__(llm)()
    assert old.scores.nbytes == 512 * llm.n_vocab() * 4
    for each in (state, old):
        target = load(tiny_model, policy)
        scores, ids = target.scores, len(target.input_ids)
        target.load_state(each)
        assert target.scores is scores
        assert len(target.input_ids) == ids
        assert target._input_ids.tolist() == PROMPT
        assert answer(target, PROMPT) == answer(load(tiny_model, policy), PROMPT)


def test_states_of_a_larger_context_fit_a_smaller_one_that_has_room(tiny_model: Path) -> None:
    # once input_ids became as long as the other context
    source, target = (load(tiny_model, "refreekv", n_ctx=n_ctx) for n_ctx in (4096, 1024))
    source.eval(PROMPT)
    target.load_state(source.save_state())
    assert (target.n_tokens, len(target.input_ids), target.n_ctx()) == (700, 1024, 1024)


def test_scores_that_were_asked_for_are_in_the_state(tiny_model: Path) -> None:
    llm, target = (load(tiny_model, POLICY, logits_all=True, n_ctx=1024) for _ in range(2))
    llm.eval(PROMPT)
    state = llm.save_state()
    np.testing.assert_array_equal(state.scores, llm._scores)
    target.load_state(state)
    np.testing.assert_array_equal(target._scores, llm._scores)
