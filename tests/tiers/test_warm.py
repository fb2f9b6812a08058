"""Decoding attends to all that is evicted by its codes, and to single rows as they were (`ReFreeKV.theta`)."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
import reference
from policies import Debug, PythonStreaming
from support import CACHE_TYPES, Sequences, ctx_of, feed, generate, kept, load, logits
from tiny import TinyModel, random_tokens
from tiny_architectures import ARCHITECTURES, Architecture

from refreekv_cpp import CacheStateError, Llama, Policy, PolicyError, ReFreeKV, SnapKV, native

PROMPT = random_tokens(1024)
ANSWER = random_tokens(8, seed=1)
POLICY = SnapKV(budget=512, n_min=0)

BITS = (4, 2)
"""Of K and V: native/tiers/warm-tier.cpp."""

EVERY = 1e-12
"""Every row is read: what decoding sees is the full cache."""

NONE = 0.9999
"""No row is: all that is evicted counts by its codes."""

SHAPES = {
    "heads of 16": TinyModel(),
    "heads of 64": TinyModel(n_embd=128, n_embd_head=64),
    "heads of 128, 7 to a KV head": TinyModel(n_embd=128, n_embd_head=128, n_head=7, n_head_kv=1),
    "heads of 80": TinyModel(n_embd=128, n_embd_head=80),
}
CACHES: dict[str, dict[str, Any]] = {
    "f32": {"type_k": CACHE_TYPES["f32"], "type_v": CACHE_TYPES["f32"]},
    "f16": {},
    "f16, flash attention": {"flash_attn": True},
    "q8_0": {"flash_attn": True, "type_k": CACHE_TYPES["q8_0"], "type_v": CACHE_TYPES["q8_0"]},
}
# upstream rounds queries and weights; with flash attention, sums of V are f16
ERROR = {"f32": 1e-5, "f16": 1e-3, "f16, flash attention": 1e-2, "q8_0": 1e-2}


@pytest.fixture(autouse=True)
def all_writes_work() -> Iterator[None]:
    yield
    native.fail_cold(0)
    native.fail_allocation(0)


def codes(theta: float, policy: Policy = POLICY) -> Policy:
    return Debug(policy=policy, theta=theta)


def read(path: Path, theta: float, *, prune: bool = True, **options: Any) -> Llama:
    llm = load(path, codes(theta), **options)
    llm.eval(PROMPT)
    if prune:
        assert llm.prune_kv() > 0
    return llm


def assert_near(ours: npt.NDArray[np.float32], full: npt.NDArray[np.float32], error: float) -> None:
    assert np.abs(ours - full).max() <= error * np.abs(full).max()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_when_everything_counts_the_answer_is_the_full_caches(tmp_path: Path, shape: str, cache: str) -> None:
    if cache == "q8_0" and SHAPES[shape].n_embd_head % 32:
        pytest.skip("llama.cpp has no such cache")
    SHAPES[shape].write(tmp_path / "model.gguf")
    full = feed(read(tmp_path / "model.gguf", 0, prune=False, **CACHES[cache]), ANSWER)
    without = feed(read(tmp_path / "model.gguf", 0, **CACHES[cache]), ANSWER)

    llm = read(tmp_path / "model.gguf", EVERY, **CACHES[cache])
    ours = feed(llm, ANSWER)
    assert_near(ours, full, ERROR[cache])
    assert np.abs(without - full).max() > 3 * np.abs(ours - full).max(), "evicting makes no difference here"

    stats = llm.kv_stats
    assert stats.n_rows_read > 0
    assert 0 < stats.bytes_codes < stats.bytes_cold


@pytest.mark.parametrize("kind", ["gemma2", "gpt-oss"], ids=["soft-cap, sliding windows", "sinks"])
def test_other_kinds_of_attention(tiny: Callable[[str], Path], kind: str) -> None:
    model = tiny(next(title for title in ARCHITECTURES if title.startswith(kind)))
    full, ours = (feed(read(model, EVERY, prune=prune, **CACHES["f32"]), ANSWER) for prune in (False, True))
    assert_near(ours, full, 1e-4)


def test_layers_with_other_numbers_of_heads(tmp_path: Path) -> None:
    # upstream pads rows of a transposed V to the widest layer's
    path = tmp_path / "model.gguf"
    Architecture("openelm", keys={"attention.head_count_kv": [1, 2, 4, 1]}).write(path)
    full = feed(read(path, 0, prune=False, **CACHES["f32"]), ANSWER)
    llm = read(path, EVERY, **CACHES["f32"])
    assert_near(feed(llm, ANSWER), full, ERROR["f32"])
    assert llm.kv_stats.n_rows_read > 0


@pytest.mark.parametrize(
    "options",
    [
        {"kv_policy": codes(EVERY, PythonStreaming())},
        {"kv_protect": [(100, 200)]},
        {"kv_cold": "memory"},
    ],
    ids=str,
)
def test_with_the_other_options(tiny: Callable[[str], Path], options: dict[str, Any]) -> None:
    def answer(**more: Any) -> list[int]:
        llm = Llama(str(tiny("gqa64")), n_ctx=2048, n_threads=1, verbose=False, **CACHES["f32"], **more)
        return [token for token, _ in zip(llm.generate(PROMPT, temp=0), range(12), strict=False)]

    assert answer(**{"kv_policy": codes(EVERY), **options}) == answer(kv_policy="full")


@pytest.mark.parametrize("theta", [NONE, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("model", ["gqa", "mha", "gqa64"])
def test_attention_is_that_of_the_codes_and_the_rows_that_are_read(
    tiny: Callable[[str], Path], model: str, theta: float
) -> None:
    llm = read(tiny(model), theta, **CACHES["f32"])
    numpy = reference.LlamaReference(tiny(model))
    numpy.read(PROMPT)
    by_codes = numpy.copy()
    for layer, positions in enumerate(kept(llm)):
        numpy.put_away(layer, positions, BITS, theta)
        by_codes.put_away(layer, positions, BITS, 1.0)
    expected = np.concatenate([numpy.read([token]) for token in ANSWER])
    ours = feed(llm, ANSWER)
    # queries and weights have 8 bits; and a row whose weight is nearly theta may be read by one and not by the other
    error = np.abs(ours - expected).max() / expected.std()
    assert error < 0.05
    assert llm.kv_stats.n_rows_read == pytest.approx(numpy.n_read, rel=0.03, abs=1)
    assert (llm.kv_stats.n_rows_read > 0) == (theta < NONE)
    if theta <= 0.01:  # without the rows it is something else
        rough = np.concatenate([by_codes.read([token]) for token in ANSWER])
        assert np.abs(rough - expected).max() / expected.std() > 2 * error


@pytest.mark.parametrize("max_error", [0.3, 0.1, 0.03])
@pytest.mark.parametrize("model", ["gqa", "gqa64"])
def test_no_head_misplaces_more_than_max_error(tiny: Callable[[str], Path], model: str, max_error: float) -> None:
    policy = Debug(policy=POLICY, theta=NONE, max_error=max_error)
    llm = load(tiny(model), policy, **CACHES["f32"])
    llm.eval(PROMPT)
    llm.prune_kv()
    numpy = reference.LlamaReference(tiny(model))
    numpy.read(PROMPT)
    for layer, positions in enumerate(kept(llm)):
        numpy.put_away(layer, positions, BITS, NONE, max_error)
    expected = np.concatenate([numpy.read([token]) for token in ANSWER])
    ours = feed(llm, ANSWER)
    stats = llm.kv_stats
    assert numpy.worst < stats.error_bound <= max_error
    assert numpy.n_read <= stats.n_rows_read <= 1.25 * numpy.n_read + 10
    assert np.abs(ours - expected).max() / expected.std() < 0.05
    # many tokens at once are judged in the same way
    other = load(tiny(model), policy, **CACHES["f32"])
    other.eval(PROMPT)
    other.prune_kv()
    other.eval(ANSWER)
    assert other.kv_stats.n_rows_read == pytest.approx(stats.n_rows_read, rel=0.02)
    assert 0 < other.kv_stats.error_bound <= max_error


def test_max_error_is_refused_where_no_row_can_be_read(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="max_error reads exact rows"):
        load(tiny("gqa64"), Debug(policy=POLICY, theta=0.003, max_error=0.1, by_graph=True))


def test_what_codes_stand_for_is_counted(tiny: Callable[[str], Path]) -> None:
    shares = []
    for theta in (NONE, 0.01, 0.001, EVERY):
        llm = read(tiny("gqa64"), theta)
        assert llm.kv_stats.by_codes == 0
        feed(llm, ANSWER)
        shares.append(llm.kv_stats.by_codes)
        assert llm.kv_stats.error_bound == 0  # it was not asked for
    assert 0.1 < shares[0] < 0.9
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 1e-3


def test_rows_count_by_what_they_would_draw(tiny: Callable[[str], Path]) -> None:
    rows, distance = [], []
    full = feed(read(tiny("gqa64"), 0, prune=False), ANSWER)
    for theta in (NONE, 0.03, 0.01, 0.003, EVERY):
        llm = read(tiny("gqa64"), theta)
        distance.append(np.abs(feed(llm, ANSWER) - full).max())
        rows.append(llm.kv_stats.n_rows_read)
    assert rows == sorted(rows)
    assert rows[0] == 0
    assert rows[-1] > 2 * rows[2] > 0
    assert distance[-1] < distance[2] < distance[0]
    assert distance[0] < np.abs(feed(read(tiny("gqa64"), 0), ANSWER) - full).max(), "codes are worth nothing"


def test_two_spans_may_read_all_the_rows_that_a_head_can_ask_for(tiny: Callable[[str], Path]) -> None:
    for theta in (0.01, 0.003):
        llm = read(tiny("gqa64"), theta)
        feed(llm, ANSWER)
        assert llm.kv_stats.n_rows_read > 100
        assert llm.kv_stats.n_rows_left == 0


def test_many_tokens_at_once_are_as_each_by_itself(tiny: Callable[[str], Path]) -> None:
    tokens = random_tokens(70, seed=3)
    for theta in (NONE, 0.01):
        one_by_one, at_once, by_four = (read(tiny("gqa64"), theta, **CACHES["f32"]) for _ in range(3))
        expected = feed(one_by_one, tokens)[-1]
        at_once.eval(tokens)
        for i in range(0, len(tokens), 4):
            by_four.eval(tokens[i : i + 4])
        for llm in (at_once, by_four):
            np.testing.assert_allclose(logits(llm), expected, atol=1e-2 * np.abs(expected).max())
            assert llm.kv_stats.n_rows_read == pytest.approx(one_by_one.kv_stats.n_rows_read, rel=0.02)


def test_codes_take_a_fifth_of_the_rows(tmp_path: Path) -> None:
    TinyModel(n_embd=256, n_embd_head=64).write(tmp_path / "model.gguf")
    llm = read(tmp_path / "model.gguf", NONE)
    assert 0.2 < llm.kv_stats.bytes_codes / llm.kv_stats.bytes_cold < 0.25
    llm.reset()
    llm.eval(PROMPT[:100])
    assert llm.kv_stats.bytes_codes == 0


def test_the_number_of_threads_changes_no_bit_of_it(tiny: Callable[[str], Path]) -> None:
    answers = []
    for n_threads in (1, 3):
        llm = read(tiny("gqa64"), 0.03)
        llama_cpp.llama_set_n_threads(ctx_of(llm), n_threads, 1)
        answers.append(feed(llm, ANSWER))
    np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize("kv_unified", [True, False])
def test_two_sequences_see_their_own(tiny: Callable[[str], Path], kv_unified: bool) -> None:
    cold = {"cold": native.enum_value("COLD_MEMORY"), "theta": EVERY}

    def answers(prune: bool) -> list[npt.NDArray[np.float32]]:
        sequences = Sequences(tiny("gqa64"), POLICY, cold=cold, kv_unified=kv_unified)
        for i in range(4):
            sequences.read_together({s: random_tokens(230, seed=10 * i + s) for s in range(2)})
        for s in range(2):
            if prune:
                assert native.prune(sequences.ctx, s) > 0
        res = [sequences.read_together({s: [ANSWER[i]] for s in range(2)}) for i in range(4)]
        assert native.stats(sequences.ctx).n_rows_read > 0 or not prune
        return [row[s] for row in res for s in range(2)]

    for ours, full in zip(answers(True), answers(False), strict=True):
        assert_near(ours, full, 1e-5)


def test_a_copied_sequence_has_them_too(tiny: Callable[[str], Path]) -> None:
    cold = {"cold": native.enum_value("COLD_MEMORY"), "theta": EVERY}
    for kv_unified in (True, 0):
        answers = []
        for prune in (False, True):
            sequences = Sequences(tiny("gqa64"), POLICY, cold=cold, kv_unified=kv_unified)
            sequences.read(0, PROMPT)
            if prune:
                assert native.prune(sequences.ctx, 0) > 0
            sequences.copy(0, 1)
            sequences.remove(0)
            answers.append(sequences.read(1, ANSWER[:1]))
        assert_near(answers[1], answers[0], 1e-5)


def test_what_came_back_is_not_there_twice(tiny: Callable[[str], Path]) -> None:
    llm, full = read(tiny("gqa64"), EVERY), read(tiny("gqa64"), EVERY, prune=False)
    native.restore(ctx_of(llm), 0)
    assert llm.kv_stats.bytes_codes == 0
    np.testing.assert_array_equal(feed(llm, ANSWER), feed(full, ANSWER))
    assert llm.kv_stats.n_rows_read == 0


def test_going_back_and_pruning_again(tiny: Callable[[str], Path]) -> None:
    # cells that are written anew have other keys
    llm, full = read(tiny("gqa64"), EVERY, **CACHES["f32"]), read(tiny("gqa64"), EVERY, prune=False, **CACHES["f32"])
    for each in (llm, full):
        each.n_tokens = 500
        each.eval(random_tokens(400, seed=7))
    assert llm.prune_kv() > 0
    assert_near(feed(llm, ANSWER), feed(full, ANSWER), ERROR["f32"])
    llm.prune_kv()  # what was generated, on top of what is gone
    for each in (llm, full):
        each.eval(random_tokens(300, seed=8)[:1])
    assert_near(feed(llm, ANSWER), feed(full, ANSWER), ERROR["f32"])


def test_they_survive_saving_and_loading(tiny: Callable[[str], Path]) -> None:
    llm = read(tiny("gqa64"), EVERY, **CACHES["f32"])
    other = load(tiny("gqa64"), codes(EVERY), **CACHES["f32"])
    other.load_state(llm.save_state())
    assert other.kv_stats.bytes_codes > 0
    assert_near(feed(other, ANSWER), feed(llm, ANSWER), 1e-6)
    assert other.kv_stats.n_rows_read > 0

    llm.reset()
    llm.eval(PROMPT[:100])
    assert llm.kv_stats.bytes_codes == 0


@pytest.mark.parametrize("options", [{"kv_evicted": "drop"}, {"kv_cold_state": False}], ids=str)
def test_they_survive_saving_and_loading_without_a_cold_store(
    tiny: Callable[[str], Path], options: dict[str, Any]
) -> None:
    llm = read(tiny("gqa64"), NONE, **options)
    other = load(tiny("gqa64"), codes(NONE), **options)
    other.load_state(llm.save_state())
    assert other.kv_stats.bytes_codes == llm.kv_stats.bytes_codes
    assert_near(feed(other, ANSWER), feed(llm, ANSWER), 1e-6)


def test_an_answer_does_not_depend_on_what_was_in_the_cache_before(tiny: Callable[[str], Path]) -> None:
    fresh, used = load(tiny("gqa64"), codes(NONE)), read(tiny("gqa64"), NONE)
    used.reset()
    other = random_tokens(len(PROMPT), seed=5)
    for llm in (fresh, used):
        llm.eval(other)
        llm.prune_kv()
    np.testing.assert_array_equal(feed(used, ANSWER), feed(fresh, ANSWER))


def turns(llm: Llama, prompts: int = 3) -> list[list[int]]:
    """The answers of a conversation in which each prompt goes on from the one before."""
    read_so_far, answers = [], []
    for i in range(prompts):
        read_so_far += PROMPT if i == 0 else random_tokens(40, seed=10 + i)
        answers.append(list(itertools.islice(llm.generate(read_so_far, temp=0.0), 6)))
        read_so_far += answers[-1]
    return answers


def test_the_next_prompt_goes_on_from_codes_and_the_rows_it_looks_at(tiny: Callable[[str], Path]) -> None:
    path = tiny("gqa64")
    full, kept_rows = load(path, "full", **CACHES["f32"]), load(path, codes(EVERY), **CACHES["f32"])
    assert turns(kept_rows) == turns(full)
    assert kept_rows.kv_stats.n_restores == 0
    n_read = kept_rows.kv_stats.n_rows_read
    kept_rows.eval(random_tokens(40, seed=20))  # a prompt reads them, too
    assert kept_rows.kv_stats.n_rows_read > n_read


def test_restore_brings_them_back_before_the_next_prompt(tiny: Callable[[str], Path]) -> None:
    path = tiny("gqa64")
    full, restored = (load(path, policy, kv_evicted="restore", **CACHES["f32"]) for policy in ("full", codes(EVERY)))
    assert turns(restored) == turns(full)
    assert restored.kv_stats.n_restores == 2


def test_a_conversation_whose_rows_were_lost_goes_on_from_codes(tiny: Callable[[str], Path]) -> None:
    path = tiny("gqa64")
    lost, none = load(path, codes(EVERY)), load(path, codes(EVERY), kv_evicted="drop")
    native.fail_cold(1)
    answers = turns(lost)
    assert lost.kv_stats.cold_full
    assert answers == turns(none)
    assert lost.kv_stats.n_prunes == none.kv_stats.n_prunes  # nothing was read again


def test_smaller_rows_are_read_too(tiny: Callable[[str], Path]) -> None:
    full = feed(read(tiny("gqa64"), 0, prune=False), ANSWER)
    assert_near(feed(read(tiny("gqa64"), EVERY, kv_cold_type="q8_0"), ANSWER), full, 2e-2)


def test_codes_stand_for_rows_that_the_store_has_no_room_for(tiny: Callable[[str], Path]) -> None:
    llm = read(tiny("gqa64"), EVERY, prune=False)
    native.fail_cold(1)
    assert llm.prune_kv() > 0
    assert llm.kv_stats.cold_full
    np.testing.assert_array_equal(feed(llm, ANSWER), feed(read(tiny("gqa64"), NONE), ANSWER))
    assert llm.kv_stats.n_rows_read == 0


def test_without_a_cold_store_codes_are_all_there_is(tiny: Callable[[str], Path]) -> None:
    llm = read(tiny("gqa64"), EVERY, kv_evicted="drop")
    assert llm.kv_stats.bytes_cold == 0
    np.testing.assert_array_equal(feed(llm, ANSWER), feed(read(tiny("gqa64"), NONE), ANSWER))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds the file there")
def test_a_file_that_is_cut_is_no_end_of_the_answer(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    llm = read(tiny("gqa64"), EVERY, kv_cold="file", kv_cold_dir=tmp_path)
    for fd in Path("/proc/self/fd").iterdir():
        if os.path.exists(fd) and str(tmp_path) in os.readlink(fd):
            os.truncate(fd, 0)
    # the codes stand for the rows that cannot be read
    np.testing.assert_array_equal(feed(llm, ANSWER), feed(read(tiny("gqa64"), NONE), ANSWER))
    assert llm.kv_stats.n_rows_read == 0


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds the file there")
def test_rows_that_are_not_in_memory_are_there_soon(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    llm = read(tiny("gqa64"), EVERY, kv_cold="file", kv_cold_dir=tmp_path)
    expected = feed(llm, ANSWER[:1])
    assert llm.kv_stats.n_rows_left == 0
    for fd in Path("/proc/self/fd").iterdir():
        if os.path.exists(fd) and str(tmp_path) in os.readlink(fd):
            os.fsync(int(fd.name))
            os.posix_fadvise(int(fd.name), 0, 0, os.POSIX_FADV_DONTNEED)
    for _ in range(1000):  # decoding does not wait for them, but it asks for them
        n_left = llm.kv_stats.n_rows_left
        llm.n_tokens -= 1
        answer = feed(llm, ANSWER[:1])
        if llm.kv_stats.n_rows_left == n_left:
            break
    np.testing.assert_array_equal(answer, expected)


@pytest.mark.parametrize("theta", [-0.1, 1, 1.5])
def test_thetas_that_are_none(theta: float) -> None:
    with pytest.raises(PolicyError, match=r"theta=.*: must be from 0 to less than 1"):
        ReFreeKV(theta=theta)


def test_there_are_codes_where_they_can_be(tiny: Callable[[str], Path]) -> None:
    assert load(tiny("gqa64"), "refreekv", codes=True).kv_stats.theta == pytest.approx(ReFreeKV().theta)
    assert load(tiny("gqa64"), "full").kv_stats.theta == 0
    for policy in (ReFreeKV.paper(), ReFreeKV.released_code(), SnapKV()):
        assert load(tiny("gqa64"), policy, codes=True).kv_stats.theta == 0
    alibi = tiny(next(title for title in ARCHITECTURES if title.startswith("mpt")))
    llm = load(alibi, codes(EVERY))
    assert llm.kv_stats.theta == 0
    llm.eval(PROMPT)
    assert llm.prune_kv() > 0
    feed(llm, ANSWER)


def whole_state(sequences: Sequences) -> Any:
    size = llama_cpp.llama_state_get_size(sequences.ctx)
    buffer = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_get_data(sequences.ctx, buffer, size) == size
    return buffer


def test_a_loaded_block_is_of_one_sequence(tiny: Callable[[str], Path]) -> None:
    # evicted before a copy and shared with it, and evicted after it: in the state they lie beside each other
    cold = {"cold": native.enum_value("COLD_MEMORY"), "theta": EVERY}
    policy = Debug(policy=PythonStreaming())
    sequences = Sequences(tiny("gqa64"), policy, cold=cold)

    def keep(positions: list[int]) -> None:
        for layer in range(4):
            native.keep(sequences.ctx, 0, layer, np.array(positions))

    sequences.read(0, random_tokens(300))
    keep([0, *range(280, 300)])
    sequences.copy(0, 1)
    sequences.read(0, random_tokens(300, seed=3))
    keep([0, *range(580, 600)])
    state = whole_state(sequences)

    other = Sequences(tiny("gqa64"), policy, cold=cold)
    assert llama_cpp.llama_state_set_data(other.ctx, state, len(state)) == len(state)
    for seq_id in range(2):
        assert_near(other.read(seq_id, [5]), sequences.read(seq_id, [5]), 1e-5)


def test_a_copy_that_the_store_has_no_room_for_is_known_by_codes(tiny: Callable[[str], Path]) -> None:
    answers = []
    for theta in (EVERY, NONE):
        cold = {"cold": native.enum_value("COLD_MEMORY"), "theta": theta}
        sequences = Sequences(tiny("gqa64"), POLICY, cold=cold, kv_unified=False)
        sequences.read(0, PROMPT)
        assert native.prune(sequences.ctx, 0) > 0
        native.fail_cold(1)
        sequences.copy(0, 1)
        native.fail_cold(0)
        answers.append(sequences.read(1, ANSWER[:1]))
        assert native.stats(sequences.ctx).n_rows_read == 0
        sequences.close()
    np.testing.assert_array_equal(*answers)


def test_a_limit_counts_the_codes_of_a_state(tiny: Callable[[str], Path]) -> None:
    saved = read(tiny("gqa64"), NONE)
    state, stats = saved.save_state(), saved.kv_stats
    for room, fits in ((stats.bytes_codes, True), (stats.bytes_codes // 2, False)):
        llm = load(tiny("gqa64"), codes(NONE), kv_memory_limit=stats.bytes + room)
        if fits:
            llm.load_state(state)
            assert llm.kv_stats.bytes_codes == stats.bytes_codes
        else:
            with pytest.raises(CacheStateError, match="the limit is"):
                llm.load_state(state)
            assert llm.kv_stats.bytes_codes == 0


def test_a_limit_counts_the_codes_of_a_copy(tiny: Callable[[str], Path]) -> None:
    def pruned(limit: int) -> Sequences:
        cold = {"cold": native.enum_value("COLD_MEMORY"), "theta": NONE, "memory_limit": limit}
        sequences = Sequences(tiny("gqa64"), POLICY, cold=cold, kv_unified=False)
        sequences.read(0, PROMPT)
        assert native.prune(sequences.ctx, 0) > 0
        return sequences

    free = pruned(0)
    one = native.stats(free.ctx)
    free.copy(0, 1)
    two = native.stats(free.ctx)
    assert two.bytes_codes == 2 * one.bytes_codes

    # less than is needed for the codes, and enough for the rows
    limited = pruned(two.bytes + two.bytes_codes - one.bytes_codes // 2)
    limited.copy(0, 1)
    assert "the limit is" in native.last_error() or "no room for a copy" in native.last_error()
    assert limited.n_tokens(1) == 0
    assert native.stats(limited.ctx).bytes_codes == one.bytes_codes


def test_the_preset_holds_sinks_and_a_window_where_the_rest_is_attended_to(tiny: Callable[[str], Path]) -> None:
    llm = load(tiny("gqa64"), ReFreeKV(), codes=True)
    llm.eval(PROMPT)
    assert llm.prune_kv() > 0
    n_out = (len(PROMPT) - 4 - 64) // 64 * 64
    assert kept(llm) == [[*range(4), *range(4 + n_out, len(PROMPT))]] * 4
    assert llm.kv_stats.bytes + llm.kv_stats.bytes_codes < 0.45 * llm.kv_stats.bytes_full

    # what somebody has chosen stands, and so does the preset where the rest is gone
    for policy in (ReFreeKV(threshold=0.3), ReFreeKV(theta=0)):
        llm = load(tiny("gqa64"), policy, codes=True)
        llm.eval(PROMPT)
        llm.prune_kv()
        assert any(len(positions) > len(PROMPT) - n_out for positions in kept(llm))


def test_what_is_generated_is_coded_too(tiny: Callable[[str], Path]) -> None:
    llm = load(tiny("gqa64"), ReFreeKV(theta=EVERY), codes=True, **CACHES["f32"])
    full = load(tiny("gqa64"), "full", kv_elastic=True, **CACHES["f32"])
    for each in (llm, full):
        each.eval(PROMPT[:600])
    llm.prune_kv()
    answer = random_tokens(600, seed=3)
    assert_near(feed(llm, answer), feed(full, answer), 10 * ERROR["f32"])
    for positions in kept(llm):
        assert len(positions) <= 256
        assert positions[:4] == [0, 1, 2, 3]
        assert positions[4:] == [*range(1200 - len(positions) + 4, 1200)]
    assert llm.kv_stats.bytes + llm.kv_stats.bytes_codes < 0.45 * llm.kv_stats.bytes_full


def test_a_long_answer_to_a_short_prompt_is_coded_from_512_tokens_on(tiny: Callable[[str], Path]) -> None:
    llm = load(tiny("gqa64"), "refreekv", codes=True)
    llm.eval(PROMPT[:20])
    feed(llm, random_tokens(480, seed=3))
    assert llm.kv_stats.bytes_codes == 0
    feed(llm, random_tokens(200, seed=4))
    assert all(len(positions) <= 256 for positions in kept(llm))


def test_drafts_that_are_taken_back_need_nothing_restored(tiny: Callable[[str], Path]) -> None:
    llm = load(tiny("gqa64"), ReFreeKV(theta=EVERY), codes=True, **CACHES["f32"])
    full = load(tiny("gqa64"), "full", kv_elastic=True, **CACHES["f32"])
    for each in (llm, full):
        each.eval(PROMPT)
    llm.prune_kv()
    for round in range(100):
        draft = random_tokens(5, seed=100 + round)
        for each in (llm, full):
            each.eval(draft)
            each.n_tokens -= 3
    assert_near(feed(llm, ANSWER), feed(full, ANSWER), ERROR["f32"])
    assert llm.kv_stats.n_restores == 0
    assert all(len(positions) <= 256 for positions in kept(llm))


def test_sequences_are_coded_each_by_itself(tiny: Callable[[str], Path]) -> None:
    answers = []
    for theta in (EVERY, 0.0):
        cold = {"cold": native.enum_value("COLD_MEMORY")}
        sequences = Sequences(tiny("gqa64"), ReFreeKV(theta=theta), codes=True, cold=cold, n_seq_max=3)
        for s in range(3):
            sequences.read(s, random_tokens(200 * (s + 1), seed=s))
        answers.append([sequences.read_together({s: [token] for s in range(3)}) for token in random_tokens(150)])
        held = [len(native.kept(sequences.ctx, s, 0)) for s in range(3)]
        assert held == [350, 550, 750] if theta == 0 else (held[0] == 350 and max(held[1:]) <= 512)
        sequences.close()
    for ours, full in zip(*answers, strict=True):
        for s in range(3):
            assert_near(ours[s], full[s], 1e-5)


def test_a_shared_prefix_that_one_sequence_cuts_is_seen_by_the_other_alone(tiny: Callable[[str], Path]) -> None:
    """A block of codes had the cells of both, and what was cut off was still seen."""
    answers = []
    for theta in (EVERY, 0.0):
        cold = {"cold": native.enum_value("COLD_MEMORY"), "theta": theta}
        sequences = Sequences(tiny("gqa64"), ReFreeKV(), cold=cold)
        sequences.read(0, PROMPT[:900])
        if theta:
            assert native.prune(sequences.ctx, 0) > 0
        sequences.copy(0, 1)
        assert llama_cpp.llama_memory_seq_rm(sequences.memory, 1, 100, -1)
        question = random_tokens(40, seed=9)
        answers.append([sequences.read(1, question), sequences.read(0, question)])
        sequences.close()
    for ours, full in zip(*answers, strict=True):
        assert_near(ours, full, 1e-5)


def test_a_state_loaded_over_a_pruned_sequence_brings_its_own_codes(tiny: Callable[[str], Path]) -> None:
    cold = {"cold": native.enum_value("COLD_MEMORY"), "theta": NONE}
    sequences = Sequences(tiny("gqa64"), POLICY, cold=cold)
    sequences.read(0, PROMPT)
    assert native.prune(sequences.ctx, 0) > 0
    n_bytes = native.stats(sequences.ctx).bytes_codes
    size = llama_cpp.llama_state_seq_get_size(sequences.ctx, 0)
    state = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(sequences.ctx, state, size, 0) == size
    for _ in range(2):
        assert llama_cpp.llama_state_seq_set_data(sequences.ctx, state, size, 0) == size
        assert native.stats(sequences.ctx).bytes_codes == n_bytes


def test_cells_that_cannot_leave_are_not_tried_with_every_token(tiny: Callable[[str], Path]) -> None:
    llm = load(tiny("gqa64"), "refreekv", codes=True, kv_protect=[(0, 600)])
    llm.eval(PROMPT[:900])
    llm.prune_kv()
    llm.eval([1])
    reused = llama_cpp.llama_perf_context(ctx_of(llm)).n_reused
    feed(llm, random_tokens(40, seed=3))
    assert llama_cpp.llama_perf_context(ctx_of(llm)).n_reused >= reused + 38


@pytest.mark.parametrize("max_error", [0.0, 0.01])
def test_numbers_that_are_none_stay_where_they_are(tiny: Callable[[str], Path], max_error: float) -> None:
    """... as codes may be, in a state that is damaged."""
    llm = load(tiny("gqa64"), ReFreeKV(max_error=max_error), codes=True)
    llm.eval(PROMPT)
    llm.prune_kv()
    feed(llm, ANSWER)
    state = llm.save_state()
    damaged = bytearray(state.llama_state)
    damaged[-7000:] = b"\xff\xff" * 3500  # of the last block of the last layer
    state.llama_state = bytes(damaged)
    llm.load_state(state)
    feed(llm, ANSWER)


def test_a_state_with_neither_codes_nor_rows_is_read_again(tiny: Callable[[str], Path]) -> None:
    source = load(tiny("gqa64"), ReFreeKV(), kv_cold_state=False)
    source.eval(PROMPT)
    assert source.prune_kv() > 0
    fresh, llm = (load(tiny("gqa64"), ReFreeKV(), codes=True) for _ in range(2))
    llm.load_state(source.save_state())
    prompt = [*PROMPT, *random_tokens(30, seed=3)]
    assert generate(llm, prompt) == generate(fresh, prompt)
    np.testing.assert_array_equal(logits(llm), logits(fresh))
