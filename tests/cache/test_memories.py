"""Memories that are made of several caches: sliding windows beside full attention, recurrent layers beside attention.

The policy works on one of them; what is refused there must not have happened in the other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from support import CACHE_TYPES, Sequences, ctx_of, feed, kept, load
from tiny import random_tokens
from tiny_architectures import SHARING_DRAFT

from refreekv_cpp import Full, ReFreeKV, UnsupportedModelError, native

POLICY = ReFreeKV(threshold=0.5, n_min=0)
PROMPT = random_tokens(900)
MORE = random_tokens(21, seed=1)[1:]

# whose attention layers 1 and 3 of 4 are the policy's
WINDOWED = "gemma2 (soft-cap, sliding window)"
SINKS = "gpt-oss (attention sinks, sliding window, experts)"
HYBRID = "jamba (hybrid)"
GEMMA4 = "gemma4 (sliding window)"
SHARED = "gemma4 (E2B: layers that share K and V)"
HEADS = "qwen35 (hybrid, with a draft head)"
COMPOSITE = [WINDOWED, SINKS, HYBRID, "lfm2 (hybrid)", HEADS, GEMMA4, SHARED]

Tiny = Callable[[str], Path]


def open_sequences(path: Path, **fields: object) -> Sequences:
    """With sequence 0 read and pruned."""
    sequences = Sequences(path, POLICY, **fields)
    sequences.read(0, PROMPT)
    assert native.prune(sequences.ctx, 0) > 0
    return sequences


@pytest.mark.parametrize("name", COMPOSITE)
def test_only_layers_that_see_everything_are_pruned(tiny: Tiny, name: str) -> None:
    llm = load(tiny(name), POLICY)
    assert [native.layer(ctx_of(llm), i).il for i in range(native.stats(ctx_of(llm)).n_layer)] == [1, 3]
    llm.eval(PROMPT)
    before = llm.kv_stats
    assert llm.prune_kv() > 0
    after = llm.kv_stats
    assert after.bytes < before.bytes
    assert after.bytes_other == before.bytes_other > 0
    assert sum(buffer.context for buffer in after.buffers) == after.bytes + after.bytes_ring + after.bytes_other


@pytest.mark.parametrize("name", COMPOSITE)
def test_full_reports_them_too(tiny: Tiny, name: str) -> None:
    llm = load(tiny(name), "full")
    llm.eval(PROMPT)
    stats = llm.kv_stats
    assert stats.n_tokens == len(PROMPT)
    assert stats.cells_kept == (len(PROMPT),) * 2
    assert stats.bytes > 0 < stats.bytes_other


@pytest.mark.parametrize("name", COMPOSITE)
def test_what_cannot_be_removed_stays_everywhere(tiny: Tiny, name: str) -> None:
    expected = open_sequences(tiny(name)).read(0, MORE)
    sequences = open_sequences(tiny(name))
    assert not sequences.remove(0, 500)
    assert sequences.n_tokens(0) == len(PROMPT)
    np.testing.assert_array_equal(sequences.read(0, MORE), expected)


@pytest.mark.parametrize("name", COMPOSITE)
def test_what_cannot_be_shifted_stays_everywhere(tiny: Tiny, name: str) -> None:
    bf16 = {"type_k": CACHE_TYPES["bf16"], "type_v": CACHE_TYPES["bf16"]}  # whose keys ggml cannot turn
    expected = open_sequences(tiny(name), **bf16).read(0, MORE)
    sequences = open_sequences(tiny(name), **bf16)
    llama_cpp.llama_memory_seq_add(sequences.memory, 0, 0, -1, 7)
    assert "llama_memory_can_shift is false" in native.last_error()
    llama_cpp.llama_memory_seq_div(sequences.memory, 0, 0, -1, 2)
    assert sequences.n_tokens(0) == len(PROMPT)
    np.testing.assert_array_equal(sequences.read(0, MORE), expected)


# llama.cpp shifts no positions of M-RoPE
@pytest.mark.parametrize("name", [name for name in COMPOSITE if name != HEADS])
def test_a_shift_moves_all_parts(tiny: Tiny, name: str) -> None:
    expected = open_sequences(tiny(name)).read(0, MORE)
    sequences = open_sequences(tiny(name))
    llama_cpp.llama_memory_seq_add(sequences.memory, 0, 0, -1, 7)
    assert sequences.n_tokens(0) == len(PROMPT) + 7
    # attention looks at distances alone
    np.testing.assert_allclose(sequences.read(0, MORE), expected, atol=2e-2)


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("name", COMPOSITE)
def test_a_whole_pruned_sequence_is_copied(tiny: Tiny, name: str, unified: bool) -> None:
    sequences = open_sequences(tiny(name), kv_unified=unified)
    sequences.copy(0, 1)
    assert sequences.kept(1) == sequences.kept(0)
    expected = sequences.read(0, MORE)
    np.testing.assert_allclose(sequences.read(1, MORE), expected, atol=1e-4)


@pytest.mark.parametrize("name", COMPOSITE)
def test_a_copy_that_is_refused_copies_nothing(tiny: Tiny, name: str) -> None:
    sequences = open_sequences(tiny(name))
    sequences.copy(0, 1, 0, 500)
    assert "only the whole sequence can" in native.last_error()
    assert sequences.n_tokens(1) == 0
    assert len(sequences.read(1, MORE)) > 0


@pytest.mark.parametrize("name", COMPOSITE)
def test_a_copy_without_room_leaves_the_target_empty_everywhere(tiny: Tiny, name: str) -> None:
    sequences = open_sequences(tiny(name), kv_unified=False)
    sequences.read(1, MORE)
    native.fail_allocation(1)
    try:
        sequences.copy(0, 1)
    finally:
        native.fail_allocation(0)
    assert "no room for a copy" in native.last_error()
    assert llama_cpp.llama_memory_seq_pos_max(sequences.memory, 1) == -1
    expected = Sequences(tiny(name), POLICY, kv_unified=False).read(1, MORE)
    np.testing.assert_allclose(sequences.read(1, MORE), expected, atol=5e-4)


@pytest.mark.parametrize("name", COMPOSITE)
def test_a_pruned_state_comes_back(tiny: Tiny, name: str) -> None:
    # the windowed cells come back in other places, and are summed in another order (in f16, with flash attention)
    llm = load(tiny(name), POLICY, flash_attn=False)
    llm.eval(PROMPT)
    assert llm.prune_kv() > 0
    state, sets = llm.save_state(), kept(llm)
    expected = feed(llm, MORE)
    other = load(tiny(name), POLICY, flash_attn=False)
    other.load_state(state)
    assert kept(other) == sets
    np.testing.assert_allclose(feed(other, MORE), expected, atol=1e-3)


@pytest.mark.parametrize("name", COMPOSITE)
def test_a_state_that_fails_in_its_second_part_leaves_nothing(tiny: Tiny, name: str) -> None:
    sequences = open_sequences(tiny(name))
    state = sequences.save(0)
    assert sequences.restore(state[:-4], 1) == 0
    assert sequences.n_tokens(1) == 0
    assert sequences.kept(1) == [[], []]


@pytest.mark.parametrize("name", ["gqa", *COMPOSITE])
def test_a_state_on_the_device_holds_rows_by_value(tiny: Tiny, name: str) -> None:
    """Upstream keeps views of the tensors such a state was written from, and rows of a cache with a policy move."""
    on_device = llama_cpp.LLAMA_STATE_SEQ_FLAGS_ON_DEVICE
    sequences = Sequences(tiny(name), POLICY, n_rs_seq=0)
    sequences.read(0, PROMPT[:200])
    for seed in range(2):
        state = sequences.save(0, on_device)
        assert len(state) > 200 * native.layer(sequences.ctx, 0).row_bytes
        expected = sequences.read(0, MORE)
        sequences.remove(0)
        sequences.read(1, random_tokens(700, seed=seed))  # the rows move
        assert sequences.restore(state, 0, on_device) > 0
        np.testing.assert_allclose(sequences.read(0, MORE), expected, atol=1e-4)
        sequences.remove(1)
        sequences.remove(0)
        assert sequences.restore(state, 0, on_device) > 0


def test_images_share_a_position(tiny: Tiny) -> None:
    """M-RoPE: the cells of an image have one position, and see each other by row and column, as upstream has it."""
    logits = []
    for policy, elastic in (("full", False), ("full", True), (POLICY, None)):
        llm = load(tiny("qwen2vl (M-RoPE)"), policy, kv_elastic=elastic, flash_attn=False)
        llm.eval(PROMPT[:50])
        # a picture of 3 x 3 patches at position 50, then text at 53
        n_embd, n = llm.n_embd(), 9
        batch = llama_cpp.llama_batch_init(4 * n, n_embd, 1)  # four numbers to a position
        batch.n_tokens = n
        vectors = np.random.default_rng(0).standard_normal((n, n_embd)).astype(np.float32)
        np.ctypeslib.as_array(batch.embd, shape=(n, n_embd))[:] = vectors
        rows, columns = [50 + i // 3 for i in range(n)], [50 + i % 3 for i in range(n)]
        np.ctypeslib.as_array(batch.pos, shape=(4 * n,))[:] = [50] * n + rows + columns + [0] * n
        for i in range(n):
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i == n - 1
        assert llama_cpp.llama_decode(ctx_of(llm), batch) == 0
        llama_cpp.llama_batch_free(batch)
        llm.n_tokens = 53
        logits.append(feed(llm, MORE))
    full, elastic_full, evicting = logits
    np.testing.assert_array_equal(full, elastic_full)
    np.testing.assert_allclose(full, evicting, atol=1e-3)  # decoded by our own kernel


def test_without_a_causal_mask_gemma4s_dense_layers_stay_causal(tiny: Tiny) -> None:
    """As upstream has it for images: elastic and evicting caches were attended to in both directions."""
    logits = []
    for policy, elastic in (("full", False), ("full", True), (POLICY, None)):
        llm = load(tiny(GEMMA4), policy, kv_elastic=elastic, flash_attn=False)
        llm.eval(PROMPT[:50])
        llama_cpp.llama_set_causal_attn(ctx_of(llm), False)
        llm.eval(PROMPT[50:90])
        llama_cpp.llama_set_causal_attn(ctx_of(llm), True)
        logits.append(feed(llm, MORE))
    full, elastic_full, evicting = logits
    np.testing.assert_array_equal(full, elastic_full)
    np.testing.assert_allclose(full, evicting, atol=5e-3)  # decoded by our own kernel


def open_draft(tiny: Tiny, target: Sequences) -> Sequences:
    return Sequences(tiny(SHARING_DRAFT.title), Full(), ctx_other=target.ctx)


def test_a_draft_that_reads_a_cache_with_a_policy_is_refused(tiny: Tiny) -> None:
    open_draft(tiny, Sequences(tiny(GEMMA4), Full())).close()
    target = Sequences(tiny(GEMMA4), POLICY)
    with pytest.raises(ValueError, match="context"):
        open_draft(tiny, target)
    assert "reads another context's cache; the other context must not have a KV policy" in native.last_error()


def test_what_is_all_windows_is_refused_by_name(tiny: Tiny) -> None:
    with pytest.raises(UnsupportedModelError, match="gemma3: every attention layer has a sliding window"):
        load(tiny("gemma3 (all of it sliding window)"), "refreekv")


def test_what_is_expected_stays_expected_when_a_batch_is_refused(tiny: Tiny) -> None:
    """Upstream tries two divisions of a batch, and the batch again after an update: each took its tokens off."""
    sequences = Sequences(tiny(WINDOWED), POLICY, swa_full=False)
    sequences.read(0, PROMPT)
    sequences.copy(0, 1)  # the windows' cells belong to two sequences now, so none of them can be written over
    native.expect(sequences.ctx, 1500)
    with pytest.raises(AssertionError):
        sequences.read(0, random_tokens(400))
    sequences.remove(1)  # the next batch gives back what is not needed
    sequences.read(0, random_tokens(400))
    assert native.layer(sequences.ctx, 0).n_capacity >= len(PROMPT) + 1500
