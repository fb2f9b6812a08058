"""What llama.cpp's operations on sequences and states do to a pruned cache: right, or refused with a reason."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from policies import POLICIES, Debug, PythonStreaming
from support import CACHE_TYPES, F32, Sequences, ctx_of, feed, kept, load, logits
from tiny import random_tokens

from refreekv_cpp import CacheStateError, Llama, Policy, PolicyError, ReFreeKV, Streaming, native

POLICY = ReFreeKV(n_min=0)
N_PROMPT = 700
PROMPT = random_tokens(N_PROMPT)
MORE = random_tokens(41, seed=1)[1:]


def pruned(path: Path, policy: ReFreeKV = POLICY, **options) -> Llama:
    llm = load(path, policy, **options)
    llm.eval(PROMPT)
    assert llm.prune_kv() > 0
    return llm


def memory_of(llm: Llama):
    return llama_cpp.llama_get_memory(ctx_of(llm))


def remove(llm: Llama, start: int, end: int = -1) -> bool:
    return llama_cpp.llama_memory_seq_rm(memory_of(llm), 0, start, end)


def assert_alike(actual: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
    """The same up to the order of sums in single precision (the caches here are f32)."""
    assert np.abs(actual - expected).max() < 1e-4 * expected.std()


# -- removing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end"),
    [(N_PROMPT - 1, -1), (500, -1), (500, 501), (-1, 10), (N_PROMPT - 1, N_PROMPT + 5)],
)
def test_removing_what_was_pruned_is_refused_and_changes_nothing(tiny_model: Path, start: int, end: int) -> None:
    llm, untouched = (pruned(tiny_model, kv_evicted="drop") for _ in range(2))
    for each in (llm, untouched):
        feed(each, MORE)
    assert not remove(llm, start, end)
    assert f"pruned at position {N_PROMPT - 1}" in native.last_error()
    assert kept(llm) == kept(untouched)
    np.testing.assert_array_equal(feed(llm, MORE), feed(untouched, MORE))


def test_removing_all_but_what_nothing_was_evicted_of_works(tiny_model: Path) -> None:
    llm, never = pruned(tiny_model, kv_evicted="drop"), load(tiny_model, POLICY)
    never.eval(PROMPT[:4])
    assert remove(llm, 4)  # the sinks are left
    llm.n_tokens = 4
    assert_alike(feed(llm, MORE), feed(never, MORE))


@pytest.mark.parametrize(("start", "end"), [(N_PROMPT, -1), (N_PROMPT + 10, -1), (N_PROMPT, N_PROMPT + 40), (5000, -1)])
def test_removing_generated_tokens_works(tiny_model: Path, start: int, end: int) -> None:
    llm, untouched = pruned(tiny_model), pruned(tiny_model)
    feed(llm, MORE)
    feed(untouched, MORE[: max(0, start - N_PROMPT)])
    assert remove(llm, start, end)
    assert kept(llm) == kept(untouched)
    llm.n_tokens = untouched.n_tokens
    np.testing.assert_array_equal(feed(llm, MORE), feed(untouched, MORE))


def test_removing_from_the_middle_of_what_was_generated(tiny_model: Path) -> None:
    llm = pruned(tiny_model)
    feed(llm, MORE)
    before = kept(llm)
    assert remove(llm, N_PROMPT + 10, N_PROMPT + 20)
    gone = set(range(N_PROMPT + 10, N_PROMPT + 20))
    assert kept(llm) == [[pos for pos in layer if pos not in gone] for layer in before]


def test_removing_everything_starts_afresh(tiny_model: Path) -> None:
    llm, fresh = pruned(tiny_model), load(tiny_model, POLICY)
    feed(llm, MORE)
    assert remove(llm, -1)
    assert native.pruned_pos(ctx_of(llm), 0) == -1
    assert kept(llm) == [[]] * 4
    llm.n_tokens = 0
    for each in (llm, fresh):
        each.eval(PROMPT[:300])
    np.testing.assert_array_equal(feed(llm, MORE), feed(fresh, MORE))
    assert kept(llm) == kept(fresh)


def test_clearing_gives_the_memory_back(tiny_model: Path) -> None:
    llm = pruned(tiny_model)
    llama_cpp.llama_memory_clear(memory_of(llm), True)
    assert native.pruned_pos(ctx_of(llm), 0) == -1
    assert native.stats(ctx_of(llm)).bytes == 0


@pytest.mark.parametrize("back", [10, 40])
def test_a_rewound_whole_cache_is_pruned_by_the_queries_that_are_left(tiny_model: Path, back: int) -> None:
    # the ring's rows of what was rewound held queries further back before
    llm = load(tiny_model, POLICY)
    llm.eval(PROMPT)
    assert remove(llm, N_PROMPT - back)
    llm.n_tokens = N_PROMPT - back
    _, positions = native.read_queries(ctx_of(llm), 0, 0)
    assert positions.tolist() == list(range(N_PROMPT - POLICY.n_window - 1, N_PROMPT - back))  # the ring has one more
    assert llm.prune_kv() > 0
    assert native.pruned_pos(ctx_of(llm), 0) == N_PROMPT - back - 1


def test_a_pruning_that_fails_leaves_the_cache_whole(tiny_model: Path) -> None:
    # rewound so far that no query is left to judge by
    llm = load(tiny_model, POLICY)
    llm.eval(PROMPT)
    assert remove(llm, N_PROMPT - 100)
    llm.n_tokens = N_PROMPT - 100
    with pytest.raises(CacheStateError, match="decode a token before pruning"):
        llm.prune_kv()
    assert kept(llm) == [list(range(N_PROMPT - 100))] * 4
    assert native.pruned_pos(ctx_of(llm), 0) == -1
    assert llm.kv_stats.n_prunes == 0
    llm.eval([5])
    assert llm.prune_kv() > 0


@pytest.mark.parametrize(
    "policy", [POLICY, ReFreeKV.paper(n_min=0, n_full_layers=0), Streaming(n_min=0)], ids=lambda policy: policy.name
)
def test_a_layer_with_nothing_left_is_passed_over(tiny_model: Path, policy: Policy) -> None:
    # once this was a crash: the policy looked at the last cell of none
    llm = load(tiny_model, policy)
    llm.eval(PROMPT)
    assert native.keep(ctx_of(llm), 0, 1, np.array([])) == N_PROMPT
    llm.prune_kv()
    assert kept(llm)[1] == []


# -- several sequences -------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["unified", "streams"])
def sequences(tiny_model: Path, request: pytest.FixtureRequest) -> Sequences:
    """Two sequences in one table of cells, or in one each."""
    return Sequences(tiny_model, POLICY, kv_unified=request.param)


@pytest.fixture
def unified(tiny_model: Path) -> Sequences:
    return Sequences(tiny_model, POLICY)


def prune(sequences: Sequences, seq_id: int) -> int:
    return native.prune(sequences.ctx, seq_id)


def test_two_sequences_pruned_at_different_times(tiny_model: Path, sequences: Sequences) -> None:
    # each is what it would be alone
    prompts = {0: PROMPT, 1: random_tokens(900, seed=9)}
    alone = {seq_id: Sequences(tiny_model, POLICY) for seq_id in prompts}

    def read(seq_id: int, tokens: list[int]) -> None:
        assert_alike(sequences.read(seq_id, tokens), alone[seq_id].read(0, tokens))

    def prune_both(seq_id: int) -> None:
        assert prune(sequences, seq_id) == prune(alone[seq_id], 0) > 0

    def read_together(tokens: dict[int, list[int]]) -> None:
        together = sequences.read_together(tokens)
        for seq_id in tokens:
            assert_alike(together[seq_id], alone[seq_id].read(0, tokens[seq_id]))

    read(0, prompts[0][:300])
    read(1, prompts[1][:400])
    read(0, prompts[0][300:])
    prune_both(0)
    read_together({0: MORE, 1: prompts[1][400:600]})
    read(1, prompts[1][600:])
    prune_both(1)
    for token in MORE:
        read_together({0: [token], 1: [token]})
    prune_both(1)
    read_together({0: MORE[:20], 1: MORE})

    for seq_id in prompts:
        assert sequences.kept(seq_id) == alone[seq_id].kept(0)
        assert native.pruned_pos(sequences.ctx, seq_id) == native.pruned_pos(alone[seq_id].ctx, 0)


def test_layers_of_equal_size_that_hold_other_sequences_do_not_share_a_mask(
    tiny_model: Path, sequences: Sequences
) -> None:
    # what the layers hold of both sequences together is as much; which slots belong to which is not the same
    n_kept = {0: (300, 400, 300, 400), 1: (400, 300, 400, 300)}
    prompts = {0: PROMPT, 1: random_tokens(700, seed=9)}
    alone = {seq_id: Sequences(tiny_model, POLICY) for seq_id in prompts}
    for seq_id, prompt in prompts.items():
        for each, its_id in ((sequences, seq_id), (alone[seq_id], 0)):
            each.read(its_id, prompt)
            for layer, n in enumerate(n_kept[seq_id]):
                native.keep(each.ctx, its_id, layer, np.arange(700 - n, 700))
    assert {native.layer(sequences.ctx, layer).n_kept for layer in range(4)} == {700}
    assert [native.layer(sequences.ctx, layer).layout for layer in range(4)] == [0, 1, 0, 1]
    together = sequences.read_together({0: MORE, 1: MORE})
    for seq_id, each in alone.items():
        assert_alike(together[seq_id], each.read(0, MORE))


def test_a_whole_pruned_sequence_can_be_copied(sequences: Sequences) -> None:
    sequences.read(0, PROMPT)
    prune(sequences, 0)
    before = sequences.kept(0)
    sequences.copy(0, 1)
    assert native.pruned_pos(sequences.ctx, 1) == N_PROMPT - 1

    # both go on
    together = sequences.read_together({0: MORE, 1: MORE})
    assert_alike(together[0], together[1])
    after = [[*layer, *range(N_PROMPT, N_PROMPT + len(MORE))] for layer in before]
    assert sequences.kept(0) == sequences.kept(1) == after

    # the copy has the limits of the original, and outlives it
    assert not sequences.remove(1, 500)
    assert sequences.remove(0)
    assert sequences.kept(0) == [[]] * 4
    assert sequences.kept(1) == after
    assert sequences.remove(1, N_PROMPT)
    assert_alike(sequences.read(1, MORE), together[1])


@pytest.mark.parametrize("was_pruned", [False, True])
def test_a_copy_outlives_the_original_at_once(tiny_model: Path, sequences: Sequences, was_pruned: bool) -> None:
    # between streams upstream puts off the copy until the next decode; the rows must not be gone by then
    alone = Sequences(tiny_model, POLICY)
    for each in (sequences, alone):
        each.read(0, PROMPT)
        if was_pruned:
            prune(each, 0)
    sequences.copy(0, 1)
    assert sequences.remove(0)
    assert_alike(sequences.read(1, MORE), alone.read(0, MORE))
    assert sequences.kept(1) == alone.kept(0)


def test_a_copy_is_of_the_cache_as_it_was(tiny_model: Path, sequences: Sequences) -> None:
    # ... although its rows are copied later, when the original has been pruned
    alone = Sequences(tiny_model, POLICY)
    alone.read(0, PROMPT)
    sequences.read(0, PROMPT)
    sequences.copy(0, 1)
    prune(sequences, 0)
    assert_alike(sequences.read(1, MORE), alone.read(0, MORE))
    assert sequences.kept(1) == alone.kept(0)


def test_cells_of_two_sequences_are_held_once(unified: Sequences) -> None:
    unified.read(0, PROMPT)
    prune(unified, 0)
    n_cells = native.layer(unified.ctx, 0).n_kept
    unified.copy(0, 1)
    assert unified.kept(1) == unified.kept(0)
    assert native.layer(unified.ctx, 0).n_kept == n_cells


def test_a_part_of_a_pruned_sequence_cannot_be_copied(sequences: Sequences) -> None:
    sequences.read(0, PROMPT)
    prune(sequences, 0)
    sequences.read(0, MORE)
    for start, end in ((0, 500), (500, -1), (-1, N_PROMPT), (N_PROMPT, -1)):
        sequences.copy(0, 1, start, end)
        assert re.search("a part of sequence 0 cannot be copied|only whole sequences", native.last_error())
        assert sequences.n_tokens(1) == 0
    # nor can anything be copied to where something was pruned
    sequences.read(1, PROMPT[:300])
    sequences.copy(1, 0)
    assert "seq_cp: sequence 0 was pruned" in native.last_error()
    assert sequences.n_tokens(0) == N_PROMPT + len(MORE)


def test_a_part_of_a_whole_sequence_can_be_copied(tiny_model: Path, unified: Sequences) -> None:
    # a shared prefix: the two part ways after it (between streams upstream copies whole sequences only)
    alone = Sequences(tiny_model, POLICY)
    alone.read(0, PROMPT[:500])
    unified.read(0, PROMPT)
    unified.copy(0, 1, 0, 500)
    assert_alike(unified.read(1, MORE), alone.read(0, MORE))


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_evicts_what_another_sequence_needs(tiny_model: Path, name: str) -> None:
    sequences = Sequences(tiny_model, POLICIES[name])
    tokens = random_tokens(1600)
    sequences.read(0, tokens[:600])
    sequences.copy(0, 1)
    sequences.read(0, tokens[600:])
    assert prune(sequences, 0) > 0
    for layer in sequences.kept(0):
        assert layer[:600] == list(range(600))
    assert sequences.kept(1) == [list(range(600))] * 4


def test_cells_that_another_sequence_needs_stay(unified: Sequences) -> None:
    unified.read(0, PROMPT)
    unified.copy(0, 1, 0, 200)
    unified.read(1, MORE)
    assert prune(unified, 0) > 0
    for layer in unified.kept(0):
        assert layer[:200] == list(range(200))
    assert unified.kept(1) == [list(range(200 + len(MORE)))] * 4

    # by hand neither
    native.keep(unified.ctx, 0, 0, np.array([N_PROMPT - 1]))
    assert unified.kept(0)[0] == [*range(200), N_PROMPT - 1]

    # until it is gone
    assert unified.remove(1)
    unified.read(0, MORE)
    assert prune(unified, 0) > 0
    assert unified.kept(0)[1][:200] != list(range(200))


def test_keeping_one_sequence_drops_the_others(tiny_model: Path, unified: Sequences) -> None:
    for seq_id in (0, 1):
        unified.read(seq_id, PROMPT)
        prune(unified, seq_id)
    before = unified.kept(1)
    llama_cpp.llama_memory_seq_keep(unified.memory, 1)
    assert unified.kept(0) == [[]] * 4
    assert unified.kept(1) == before
    assert native.pruned_pos(unified.ctx, 0) == -1
    assert native.pruned_pos(unified.ctx, 1) == N_PROMPT - 1
    # what was freed is used again
    alone = Sequences(tiny_model, POLICY)
    assert_alike(unified.read(0, PROMPT), alone.read(0, PROMPT))


def test_keeping_one_sequence_leaves_other_streams_alone(tiny_model: Path) -> None:
    # llama.cpp's seq_keep looks at the stream of the sequence only
    streams = Sequences(tiny_model, POLICY, kv_unified=False)
    streams.read(0, PROMPT)
    prune(streams, 0)
    before = streams.kept(0)
    streams.read(1, PROMPT[:100])
    llama_cpp.llama_memory_seq_keep(streams.memory, 1)
    assert streams.kept(0) == before
    assert native.pruned_pos(streams.ctx, 0) == N_PROMPT - 1
    assert not streams.remove(0, 500)


def test_the_last_of_two_copies_counts(tiny_model: Path) -> None:
    # between streams both are still to be made when the second is asked for
    streams, alone = (Sequences(tiny_model, POLICY, kv_unified=False, n_seq_max=3) for _ in range(2))
    streams.read(0, PROMPT[:300])
    for each in (streams, alone):
        each.read(1, random_tokens(200, seed=7))
    streams.copy(0, 2)
    streams.copy(1, 2)
    assert_alike(streams.read(2, MORE), alone.read(1, MORE))
    assert streams.kept(2) == alone.kept(1)


@pytest.mark.parametrize("target_has_tokens", [False, True])
def test_pruning_a_sequence_without_queries_of_its_own(tiny_model: Path, target_has_tokens: bool) -> None:
    # nor do the queries of what it was before the copy count, although their positions fit
    streams = Sequences(tiny_model, POLICY, kv_unified=False)
    if target_has_tokens:
        streams.read(1, random_tokens(N_PROMPT, seed=5))
    streams.read(0, PROMPT)
    streams.copy(0, 1)
    assert native.read_queries(streams.ctx, 1, 0)[1].tolist() == []
    with pytest.raises(CacheStateError, match="decode a token before pruning"):
        prune(streams, 1)


def test_pruning_a_copy_in_the_same_table_without_queries_of_its_own(unified: Sequences) -> None:
    unified.read(0, PROMPT)
    unified.copy(0, 1)
    with pytest.raises(CacheStateError, match="decode a token before pruning"):
        prune(unified, 1)


@pytest.mark.parametrize("seq_id", [-1, 1, 2, 10_000])
def test_sequences_that_are_not_there(sequences: Sequences, seq_id: int) -> None:
    sequences.read(0, PROMPT[:20])
    with pytest.raises(PolicyError, match=f"sequence {seq_id} "):
        prune(sequences, seq_id)
    with pytest.raises(PolicyError, match=f"sequence {seq_id} "):
        native.keep(sequences.ctx, seq_id, 0, np.array([1]))
    with pytest.raises(PolicyError, match=f"sequence {seq_id} "):
        native.read_queries(sequences.ctx, seq_id, 0)


def test_layers_that_are_not_there(tiny_model: Path) -> None:
    llm = pruned(tiny_model)
    with pytest.raises(PolicyError, match="layer 4 has no KV cache"):
        native.keep(ctx_of(llm), 0, 4, np.array([1]))
    for layer in (-1, 4):
        with pytest.raises(PolicyError, match=f"index={layer}: must be 0 to 3"):
            native.layer(ctx_of(llm), layer)


# -- room --------------------------------------------------------------------------------------------------------------


def test_more_tokens_than_any_layer_has_cells(tiny_model: Path) -> None:
    # the context is full of tokens, and no layer ever had room for half of them
    llm = load(tiny_model, Streaming(budget=200))
    for start in range(0, 2048, 512):
        llm.eval(random_tokens(512, seed=start))
        llm.prune_kv()
        assert max(llm.kv_stats.cells_capacity) <= 1024
    stats = llm.kv_stats
    assert stats.n_tokens == llm.n_tokens == 2048
    assert max(stats.cells_kept) <= 200 + 256
    assert stats.bytes < stats.bytes_full / 3
    # n_ctx counts tokens, kept or not
    with pytest.raises(RuntimeError):
        llm.eval([5])


@pytest.mark.parametrize("options", [{}, {"flash_attn": True}, {"type_k": F32, "type_v": F32}], ids=str)
def test_the_books_balance(tiny_model: Path, options: dict) -> None:
    llm = load(tiny_model, POLICY, **options)
    assert llm.kv_stats.bytes == 0

    llm.eval(PROMPT)
    before = llm.kv_stats
    row_bytes = [native.layer(ctx_of(llm), layer).row_bytes for layer in range(4)]
    # 2 KV heads of 16 numbers, K and V
    assert row_bytes == [2 * 2 * 16 * (4 if "type_k" in options else 2)] * 4
    assert before.n_tokens == N_PROMPT
    assert before.cells_kept == (N_PROMPT,) * 4
    assert before.cells_capacity == (768,) * 4
    assert before.budget == 1
    assert before.bytes_full == N_PROMPT * sum(row_bytes)
    assert before.bytes >= 768 * sum(row_bytes)
    assert before.n_prunes == before.bytes_freed == before.prune_ms == 0
    assert before.n_layouts == 1

    n_evicted = llm.prune_kv()
    after = llm.kv_stats
    assert after.cells_kept == tuple(map(len, kept(llm)))
    assert n_evicted == 4 * N_PROMPT - sum(after.cells_kept) > 0
    assert after.budget == pytest.approx(np.mean(after.cells_kept) / N_PROMPT)
    assert after.bytes_full == before.bytes_full
    assert after.bytes_freed == before.bytes - after.bytes > 0
    # whole blocks leave, and what stays needs no more room than it has
    assert all((N_PROMPT - n) % 256 == 0 for n in after.cells_kept)
    assert after.cells_capacity == tuple(-(-n // 256) * 256 for n in after.cells_kept)
    assert after.n_prunes == 1
    assert after.prune_ms > 0
    # an elastic buffer is at most a page larger than its rows
    assert sum(map(np.multiply, after.cells_capacity, row_bytes)) <= after.bytes
    assert after.bytes - sum(map(np.multiply, after.cells_capacity, row_bytes)) <= 4 * 65536
    # one window of f16 queries for each layer
    assert after.bytes_ring == before.bytes_ring >= 4 * POLICY.n_window * 4 * 16 * 2

    feed(llm, MORE)
    grown = llm.kv_stats
    assert grown.n_tokens == N_PROMPT + len(MORE)
    assert grown.cells_kept == tuple(n + len(MORE) for n in after.cells_kept)
    assert (grown.bytes_freed, grown.n_prunes, grown.prune_ms) == (after.bytes_freed, after.n_prunes, after.prune_ms)


def test_layers_of_equal_size_share_a_mask(tiny_model: Path) -> None:
    # whatever they hold: what lies behind a pruning looks the same to every query
    llm = load(tiny_model, POLICY)
    llm.eval(PROMPT)
    rng = np.random.default_rng(0)
    sets = [sorted(rng.choice(N_PROMPT, n, replace=False)) for n in (300, 300, 400, 300)]
    for layer, positions in enumerate(sets):
        native.keep(ctx_of(llm), 0, layer, np.array(positions))
    assert llm.kv_stats.n_layouts == 2
    assert [native.layer(ctx_of(llm), layer).layout for layer in range(4)] == [0, 0, 1, 0]


# -- states ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"flash_attn": True}, {"type_k": F32, "type_v": F32}, {"flash_attn": True, "type_v": F32}], ids=str
)
def test_a_pruned_state_goes_on_where_it_was_saved(tiny_model: Path, options: dict) -> None:
    llm = load(tiny_model, POLICY, kv_cold_state=False, **options)
    llm.eval(PROMPT)
    whole = llm.save_state()
    llm.prune_kv()
    feed(llm, MORE)
    state = llm.save_state()
    # the cells that went are not in it, nor is anything in their place
    row_bytes = native.layer(ctx_of(llm), 0).row_bytes
    n_cells = sum(map(len, kept(llm)))
    assert n_cells * row_bytes < state.llama_state_size < whole.llama_state_size
    assert state.llama_state_size - n_cells * row_bytes == pytest.approx(
        whole.llama_state_size - 4 * N_PROMPT * row_bytes, rel=0.25
    )

    other = load(tiny_model, POLICY, **options)
    other.load_state(state)
    assert kept(other) == kept(llm)
    assert native.pruned_pos(ctx_of(other), 0) == N_PROMPT - 1
    assert not remove(other, 500)
    np.testing.assert_array_equal(feed(other, MORE), feed(llm, MORE))


def test_a_whole_state_can_be_pruned_once_it_has_queries(tiny_model: Path) -> None:
    llm = load(tiny_model, POLICY)
    llm.eval(PROMPT)
    other = load(tiny_model, POLICY)
    other.eval(random_tokens(N_PROMPT, seed=3))  # its ring has queries, of something else
    other.load_state(llm.save_state())
    assert native.pruned_pos(ctx_of(other), 0) == -1
    assert native.read_queries(ctx_of(other), 0, 0)[1].tolist() == []
    for each in (llm, other):
        each.eval(random_tokens(POLICY.n_window + 1, seed=4)[1:])
        assert each.prune_kv() > 0
    assert kept(other) == kept(llm)


def test_a_state_replaces_what_was_there(tiny_model: Path) -> None:
    llm = pruned(tiny_model)
    state = llm.save_state()
    other = pruned(tiny_model)
    feed(other, MORE)
    other.prune_kv()
    other.load_state(state)
    assert kept(other) == kept(llm)
    np.testing.assert_array_equal(feed(other, MORE), feed(llm, MORE))


def test_hidden_cells_are_not_saved(tiny_model: Path) -> None:
    llm = load(tiny_model, Debug(policy=POLICY, mask_only=True), type_k=F32, type_v=F32)
    llm.eval(PROMPT)
    assert llm.prune_kv() > 0
    other = load(tiny_model, POLICY, type_k=F32, type_v=F32)
    other.load_state(llm.save_state())
    assert kept(other) == kept(llm)
    assert_alike(feed(other, MORE), feed(llm, MORE))


@pytest.mark.parametrize(
    ("policy", "options", "reason"),
    [
        ("full", {}, ""),
        (POLICY, {"type_k": F32}, "other cache types"),
        (POLICY, {"type_v": F32}, "other cache types"),
        (POLICY, {"type_k": CACHE_TYPES["bf16"]}, "other cache types"),  # of the same size
        (POLICY, {"type_v": CACHE_TYPES["bf16"]}, "other cache types"),
        (POLICY, {"flash_attn": False}, "flash_attn = True; this context has False"),
        (POLICY, {"n_ctx": 512}, ""),  # upstream's refusal
    ],
    ids=lambda value: getattr(value, "name", None) or str(value),
)
def test_a_state_of_another_kind_is_refused(
    tiny_model: Path, policy: str | ReFreeKV, options: dict, reason: str
) -> None:
    state = pruned(tiny_model).save_state()
    other = load(tiny_model, policy, **options)
    if "n_ctx" in options:
        # llama-cpp-python would fail before llama.cpp sees it
        assert set_state(other, state.llama_state) == 0
    else:
        with pytest.raises(RuntimeError, match="state data"):
            other.load_state(state)
        assert reason in native.last_error()
    assert_usable(other, tiny_model, policy, options)


def test_a_state_without_policy_is_refused(tiny_model: Path) -> None:
    full = load(tiny_model, "full")
    full.eval(PROMPT)
    llm = load(tiny_model, POLICY)
    with pytest.raises(RuntimeError, match="state data"):
        llm.load_state(full.save_state())
    assert "not written by a context with a KV policy" in native.last_error()
    assert_usable(llm, tiny_model, POLICY, {})


def set_state(llm: Llama, state: bytes) -> int:
    """Bytes read; 0: refused."""
    buffer = (ctypes.c_uint8 * max(1, len(state))).from_buffer_copy(state or b"\0")
    return llama_cpp.llama_state_set_data(ctx_of(llm), buffer, len(state))


def assert_usable(llm: Llama, path: Path, policy: str | ReFreeKV, options: dict) -> None:
    """A failed load leaves an empty cache, as good as new."""
    assert llm.kv_stats.n_tokens == 0
    fresh = load(path, policy, **options)
    for each in (llm, fresh):
        each.reset()
        each.eval(PROMPT[:300])
    np.testing.assert_array_equal(logits(llm), logits(fresh))


# where a state with one sequence has what: native/state/state.cpp
STATE_MAGIC = b"RFKV"
STATE_VERSION = 4
STATE_HEADER = 20
STATE_LAYER = 32


def damaged(state: bytes) -> Iterator[bytes]:
    """Cut short, or with a byte of the store's header, of its first layer's, or of the cells it names turned over."""
    rng = np.random.default_rng(0)
    for n in [*range(0, 200, 9), *rng.integers(200, len(state), 40), len(state) - 1]:
        yield state[:n]
    start = state.index(STATE_MAGIC)
    layer = start + STATE_HEADER + N_PROMPT
    for at in [*range(start, start + STATE_HEADER), *range(layer, layer + STATE_LAYER + 32)]:
        yield state[:at] + bytes([state[at] ^ 0xFF]) + state[at + 1 :]


def test_a_damaged_state_is_refused_and_does_no_harm(tiny_model: Path) -> None:
    original = pruned(tiny_model)
    state = original.save_state().llama_state
    llm = load(tiny_model, POLICY)
    n_refused = 0
    for bad in damaged(state):
        if set_state(llm, bad) == len(state):
            # all that can go unnoticed: a layer names another of the cells
            assert list(map(len, kept(llm))) == list(map(len, kept(original)))
        else:
            n_refused += 1
    assert n_refused > 100
    llama_cpp.llama_memory_clear(memory_of(llm), True)
    assert_usable(llm, tiny_model, POLICY, {})


def test_a_state_of_an_older_version_is_refused(tiny_model: Path) -> None:
    state = pruned(tiny_model).save_state().llama_state
    version = state.index(STATE_MAGIC) + STATE_VERSION
    llm = load(tiny_model, POLICY)
    assert set_state(llm, state[:version] + bytes([state[version] - 1]) + state[version + 1 :]) == 0
    assert "or by another version" in native.last_error()
    assert_usable(llm, tiny_model, POLICY, {})


def test_a_state_that_names_a_cell_twice_is_refused(tiny_model: Path) -> None:
    state = pruned(tiny_model).save_state().llama_state
    cells = state.index(STATE_MAGIC) + STATE_HEADER + N_PROMPT + STATE_LAYER
    llm = load(tiny_model, POLICY)
    assert set_state(llm, state[: cells + 4] + state[cells : cells + 4] + state[cells + 8 :]) == 0
    assert "names a cell that is not there" in native.last_error()
    assert_usable(llm, tiny_model, POLICY, {})


def test_the_state_of_one_sequence_goes_into_another(sequences: Sequences) -> None:
    sequences.read(0, PROMPT)
    prune(sequences, 0)
    size = llama_cpp.llama_state_seq_get_size(sequences.ctx, 0)
    state = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(sequences.ctx, state, size, 0) == size
    assert llama_cpp.llama_state_seq_set_data(sequences.ctx, state, size, 1) == size
    assert sequences.kept(1) == sequences.kept(0)
    assert native.pruned_pos(sequences.ctx, 1) == N_PROMPT - 1
    assert not sequences.remove(1, 500)
    together = sequences.read_together({0: MORE, 1: MORE})
    assert_alike(together[0], together[1])


# -- rows in place -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("by_graph", [False, True])
def test_a_few_cells_are_evicted_and_come_back(tiny_model: Path, flash_attn: bool, by_graph: bool) -> None:
    """... in the room that is there: rows move by less than the layers shrink or grow otherwise."""
    kind = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attn else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    cold = {"cold": native.enum_value("COLD_MEMORY")}
    answers = []
    for evicts in (False, True):
        policy = Debug(policy=PythonStreaming(), by_graph=by_graph)
        sequences = Sequences(tiny_model, policy, cold=cold, flash_attn_type=kind)
        sequences.read(0, PROMPT)
        if evicts:
            for layer in range(4):
                positions = [*range(5), *range(12, 300), *range(307, N_PROMPT)]
                assert native.keep(sequences.ctx, 0, layer, np.array(positions)) == 14
            assert native.restore(sequences.ctx, 0) == 4 * 14
        answers.append(sequences.read(0, MORE))
        sequences.close()
    assert_alike(*answers)


@pytest.mark.parametrize("flash_attn", [False, True])
def test_rows_that_stay_are_the_same_by_graph(tiny_model: Path, flash_attn: bool) -> None:
    kind = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attn else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    answers = []
    for by_graph in (False, True):
        policy = Debug(policy=PythonStreaming(), by_graph=by_graph)
        sequences = Sequences(tiny_model, policy, flash_attn_type=kind)
        sequences.read(0, PROMPT)
        for layer in range(4):
            native.keep(sequences.ctx, 0, layer, np.array([*range(5), *range(12, N_PROMPT)]))
        answers.append(sequences.read(0, MORE))
        sequences.close()
    np.testing.assert_array_equal(*answers)
