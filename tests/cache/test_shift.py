"""Positions that change (llama_memory_seq_add, llama_memory_seq_div), as for an endless chat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from support import CACHE_TYPES, Sequences, ctx_of, feed, kept, load
from tiny import random_tokens

from refreekv_cpp import Llama, Policy, ReFreeKV, Streaming, native

N_PROMPT = 700
PROMPT = random_tokens(N_PROMPT)
MORE = random_tokens(41, seed=1)[1:]
FIRST, END = 4, 300  # positions that leave
REFREEKV = ReFreeKV(n_min=0)
IN_F32 = {"type_k": CACHE_TYPES["f32"], "type_v": CACHE_TYPES["f32"]}


def memory_of(llm: Llama) -> Any:
    return llama_cpp.llama_get_memory(ctx_of(llm))


def can_shift(llm: Llama) -> bool:
    return bool(llama_cpp.llama_memory_can_shift(memory_of(llm)))


def shift(llm: Llama) -> None:
    """Positions FIRST to END - 1 are removed, and what lies behind moves up, as in a server with a full context."""
    assert llama_cpp.llama_memory_seq_rm(memory_of(llm), 0, FIRST, END)
    llama_cpp.llama_memory_seq_add(memory_of(llm), 0, END, -1, FIRST - END)
    llm.n_tokens -= END - FIRST


def assert_alike(actual: npt.NDArray[np.float32], expected: npt.NDArray[np.float32], part: float = 1e-4) -> None:
    assert np.abs(actual - expected).max() < part * expected.std()


@pytest.mark.parametrize("cache_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("flash_attn", [False, True])
def test_the_elastic_cache_shifts_bit_for_bit_as_stocks(
    tiny: Callable[[str], Path], cache_type: str, flash_attn: bool
) -> None:
    if cache_type == "q8_0" and not flash_attn:
        pytest.skip("llama.cpp quantises V with flash attention only")
    options = {"type_k": CACHE_TYPES[cache_type], "type_v": CACHE_TYPES[cache_type], "flash_attn": flash_attn}
    answers = []
    for elastic in (False, True):
        llm = load(tiny("gqa64"), "full", kv_elastic=elastic, **options)
        llm.eval(PROMPT)
        shift(llm)
        answers.append(feed(llm, MORE))
    np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize("codes", [False, True])
def test_what_was_evicted_comes_back_for_a_shift(tiny_model: Path, codes: bool) -> None:
    full = load(tiny_model, "full", **IN_F32)
    llm = load(tiny_model, REFREEKV, codes=codes, **IN_F32)
    for each in (full, llm):
        each.eval(PROMPT)
    assert llm.prune_kv() > 0
    for each in (full, llm):
        shift(each)
    n_left = N_PROMPT - (END - FIRST)
    assert kept(llm) == [list(range(n_left))] * len(kept(llm))
    # with codes cells are coded again before the first token of an answer
    assert_alike(feed(llm, MORE), feed(full, MORE), 0.02 if codes else 1e-4)
    assert (llm.kv_stats.bytes_codes > 0) == codes


@pytest.mark.parametrize("policy", [Streaming(n_min=0), ReFreeKV(n_min=0)], ids=["streaming", "refreekv"])
def test_without_what_is_gone(tiny_model: Path, policy: Policy) -> None:
    # attention looks at distances alone: if all positions move alike, nothing changes
    llms = [load(tiny_model, policy, kv_evicted="drop", **IN_F32) for _ in range(2)]
    for llm in llms:
        llm.eval(PROMPT)
        llm.prune_kv()
    before = kept(llms[0])
    llama_cpp.llama_memory_seq_add(memory_of(llms[0]), 0, 0, -1, 100)
    llms[0].n_tokens += 100
    assert kept(llms[0]) == [[pos + 100 for pos in layer] for layer in before]
    assert native.pruned_pos(ctx_of(llms[0]), 0) == native.pruned_pos(ctx_of(llms[1]), 0) + 100
    assert_alike(feed(llms[0], MORE), feed(llms[1], MORE), 1e-3)


def test_positions_are_divided(tiny_model: Path) -> None:
    answers = []
    for policy in ("full", REFREEKV):
        llm = load(tiny_model, policy, **IN_F32)
        llm.eval(PROMPT)
        llm.prune_kv()
        llama_cpp.llama_memory_seq_div(memory_of(llm), 0, 0, -1, 2)
        llm.n_tokens = N_PROMPT // 2
        answers.append(feed(llm, MORE[:1]))
    assert_alike(answers[1], answers[0])


def test_a_shift_of_nothing_brings_nothing_back(tiny_model: Path) -> None:
    llm = load(tiny_model, REFREEKV, codes=True)
    llm.eval(PROMPT)
    llm.prune_kv()
    before = kept(llm)
    for start, end, by in ((10, -1, 0), (20, 20, 5), (N_PROMPT, -1, 5)):
        llama_cpp.llama_memory_seq_add(memory_of(llm), 0, start, end, by)
    llama_cpp.llama_memory_seq_div(memory_of(llm), 0, 0, -1, 1)
    assert kept(llm) == before


@pytest.mark.parametrize("options", [{"kv_evicted": "drop"}, {"type_k": CACHE_TYPES["bf16"]}], ids=["no-rows", "bf16"])
def test_refused(tiny_model: Path, options: dict[str, Any]) -> None:
    llm = load(tiny_model, REFREEKV, codes=True, **options)
    llm.eval(PROMPT)
    llm.prune_kv()
    before = kept(llm)
    assert not can_shift(llm)
    llama_cpp.llama_memory_seq_add(memory_of(llm), 0, 10, -1, -5)
    assert "seq_add: positions of sequence 0 cannot change: llama_memory_can_shift is false" in native.last_error()
    llama_cpp.llama_memory_seq_div(memory_of(llm), 0, 10, -1, 2)
    assert "seq_div" in native.last_error()
    assert kept(llm) == before
    assert llama_cpp.llama_memory_seq_pos_max(memory_of(llm), 0) == N_PROMPT - 1


def test_no_state_until_the_keys_are_turned(tiny_model: Path) -> None:
    sequences = Sequences(tiny_model, REFREEKV)
    sequences.read(0, PROMPT)
    llama_cpp.llama_memory_seq_add(sequences.memory, 0, 0, -1, 5)
    assert sequences.save(0) == b""
    sequences.read(0, MORE)
    sequences.restore(sequences.save(0), 1)
    assert sequences.n_tokens(1) == N_PROMPT + 5 + len(MORE)
    assert_alike(sequences.read(1, MORE), sequences.read(0, MORE))


def test_a_sequence_that_shares_pruned_cells(tiny_model: Path) -> None:
    sequences = Sequences(tiny_model, Streaming(n_min=0))
    sequences.read(0, PROMPT)
    assert native.prune(sequences.ctx, 0) > 0
    sequences.copy(0, 1)
    llama_cpp.llama_memory_seq_add(sequences.memory, 0, 0, -1, 5)
    assert "sequence 1 was pruned and shares cells with it" in native.last_error()
    assert [sequences.n_tokens(s) for s in (0, 1)] == [N_PROMPT, N_PROMPT]
