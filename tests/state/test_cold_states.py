"""Saved states have what was evicted in them: a conversation that is loaded goes on as if it had stayed."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from restoring import CACHES, COLD, MORE, POLICY, PROMPT, cache_of, read, restore
from support import HELPERS, Sequences, ctx_of, feed, generate, kept, load
from tiny import N_SPECIAL, random_tokens

from refreekv_cpp import CacheStateError, Llama, PolicyError, native

Tiny = Callable[[str], Path]

QUESTION = random_tokens(POLICY.n_window + 20, seed=2)
# llama-cpp-python does not count tokens that leave a character unfinished
ASCII = {N_SPECIAL + byte: -1000.0 for byte in range(128, 256)}
SHORT_QUESTION = random_tokens(20, seed=3)
COLD_MEMORY = {"cold": native.enum_value("COLD_MEMORY")}

# where a state of one sequence has what: native/state/state-cold.cpp
COLD_MAGIC = b"RFKC"


@pytest.fixture(autouse=True)
def all_writes_work() -> Iterator[None]:
    yield
    native.fail_cold(0)


@contextlib.contextmanager
def tokens_read(llm: Llama) -> Iterator[list[int]]:
    """How many tokens each batch has."""
    batches: list[int] = []
    decode = llm._ctx.decode
    llm._ctx.decode = lambda batch: (batches.append(batch.n_tokens()), decode(batch))
    try:
        yield batches
    finally:
        llm._ctx.decode = decode


# -- bit for bit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", CACHES, ids=str)
@pytest.mark.parametrize("cold", COLD)
def test_what_was_evicted_comes_back_after_loading(tiny: Tiny, cold: str, options: dict) -> None:
    llms = [load(tiny("gqa64"), POLICY, kv_cold=cold, **options) for _ in range(3)]
    saved, never, loaded = llms
    for llm in (saved, never):
        llm.eval(PROMPT)
    n_evicted = saved.prune_kv()
    state = saved.save_state()
    before = kept(saved)

    for llm in (saved, loaded):  # over itself, and into an empty one
        llm.load_state(state)
        assert kept(llm) == before
        assert llm.kv_stats.bytes_cold == llm.kv_stats.bytes_full - llm.kv_stats.bytes_kept
        assert llm.save_state().llama_state == state.llama_state
        assert restore(llm) == n_evicted
        assert cache_of(llm) == cache_of(never)
    np.testing.assert_array_equal(feed(loaded, MORE), feed(never, MORE))


def test_a_conversation_goes_on_in_another_process(tiny_model: Path, tmp_path: Path) -> None:
    llm = load(tiny_model, POLICY)
    tokens = [*PROMPT, *generate(llm, PROMPT), *QUESTION]
    (tmp_path / "state").write_bytes(pickle.dumps((llm, llm.save_state(), tokens)))
    script = """
import pickle, sys
sys.path.insert(0, sys.argv[2])
from support import generate, kept
llm, state, tokens = pickle.load(open(sys.argv[1], "rb"))
llm.load_state(state)
answer = generate(llm, tokens)
print(answer, llm.kv_stats.n_restores, kept(llm))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "state"), str(HELPERS)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=120)
    assert done.stdout.strip() == f"{generate(llm, tokens)} 1 {kept(llm)}"


@pytest.mark.parametrize("unified", [True, False])
def test_the_state_of_one_sequence_is_restored_in_another(tiny_model: Path, unified: bool) -> None:
    first, second = (Sequences(tiny_model, POLICY, cold=COLD_MEMORY, kv_unified=unified) for _ in range(2))
    first.read(0, PROMPT)
    n_evicted = native.prune(first.ctx, 0)
    second.read(0, PROMPT[:600])
    native.prune(second.ctx, 0)
    assert second.restore(first.save(0), 1) > 0
    assert native.restore(second.ctx, 1) == n_evicted
    assert second.kept(1) == [list(range(len(PROMPT)))] * 4
    native.restore(second.ctx, 0)  # nor were the rows of the one beside it harmed
    for seq_id, n in ((1, len(PROMPT)), (0, 600)):
        alone = Sequences(tiny_model, POLICY)
        alone.read(0, PROMPT[:n])
        expected = alone.read(0, MORE)
        assert np.abs(second.read(seq_id, MORE) - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize("unified", [True, False])
def test_a_state_of_several_sequences(tiny_model: Path, unified: bool) -> None:
    first, second = (Sequences(tiny_model, POLICY, cold=COLD_MEMORY, kv_unified=unified) for _ in range(2))
    for seq_id, n in ((0, 700), (1, 600)):
        first.read(seq_id, PROMPT[:n])
        native.prune(first.ctx, seq_id)
    size = llama_cpp.llama_state_get_size(first.ctx)
    state = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_get_data(first.ctx, state, size) == size
    assert llama_cpp.llama_state_set_data(second.ctx, state, size) == size
    for seq_id, n in ((0, 700), (1, 600)):
        assert second.kept(seq_id) == first.kept(seq_id)
        assert native.restore(second.ctx, seq_id) > 0
        assert second.kept(seq_id) == [list(range(n))] * 4
        native.restore(first.ctx, seq_id)
        np.testing.assert_array_equal(second.read(seq_id, MORE), first.read(seq_id, MORE))


def test_a_file_of_one_sequence(tiny_model: Path, tmp_path: Path) -> None:
    first, second = (Sequences(tiny_model, POLICY, cold=COLD_MEMORY) for _ in range(2))
    first.read(0, PROMPT)
    n_evicted = native.prune(first.ctx, 0)
    path, tokens = str(tmp_path / "state").encode(), (llama_cpp.llama_token * 1)()
    size = llama_cpp.llama_state_seq_save_file(first.ctx, path, 0, tokens, 0)
    n_read = ctypes.c_size_t()
    assert llama_cpp.llama_state_seq_load_file(second.ctx, path, 0, tokens, 1, ctypes.byref(n_read)) == size
    assert native.restore(second.ctx, 0) == n_evicted


# -- turns -------------------------------------------------------------------------------------------------------------


def test_the_next_prompt_restores_and_reads_nothing_again(tiny_model: Path) -> None:
    stayed, loaded = load(tiny_model, POLICY), load(tiny_model, POLICY)
    tokens = [*PROMPT, *generate(stayed, PROMPT), *QUESTION]
    loaded.load_state(stayed.save_state())
    expected = generate(stayed, tokens)
    with tokens_read(loaded) as batches:
        assert generate(loaded, tokens) == expected
    assert sum(batches) < len(QUESTION) + 8
    assert kept(loaded) == kept(stayed)
    assert loaded.kv_stats.n_restores == 1


def test_a_short_prompt_is_judged_by_as_many_queries_as_ever(tiny_model: Path) -> None:
    # a state has none
    llm = load(tiny_model, POLICY)
    tokens = [*PROMPT, *generate(llm, PROMPT), *SHORT_QUESTION]
    llm.load_state(llm.save_state())
    with tokens_read(llm) as batches:
        generate(llm, tokens, n=1)
    assert batches == [POLICY.n_window]
    assert llm.kv_stats.n_restores == 1


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_going_back_to_a_cached_conversation_reads_nothing_again(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    cache = llama_cpp.LlamaRAMCache() if kind == "ram" else llama_cpp.LlamaDiskCache(str(tmp_path))
    with contextlib.closing(cache.cache) if kind == "disk" else contextlib.nullcontext():
        llm, alone = load(tiny_model, POLICY), load(tiny_model, POLICY)
        llm.set_cache(cache)
        options: dict[str, Any] = {"max_tokens": 4, "temperature": 0.0, "logit_bias": ASCII}
        other = random_tokens(650, seed=9)
        with contextlib.redirect_stderr(io.StringIO()):  # the disk's tells what it does
            llm(PROMPT, **options)
            llm(other, **options)
            state = cache[PROMPT]
            answered = state.input_ids[: state.n_tokens].tolist()
            tokens = [*answered, *QUESTION]
            cache[answered] = state  # the disk's takes out what it gives
            with tokens_read(llm) as batches:
                second = llm(tokens, **options)
        assert sum(batches) < len(QUESTION) + 8
        alone(PROMPT, **options)
        assert second["choices"] == alone(tokens, **options)["choices"]
        assert kept(llm) == kept(alone)


# -- the option --------------------------------------------------------------------------------------------------------


def test_the_evicted_rows_can_be_left_out(tiny_model: Path) -> None:
    llm, other = read(tiny_model, kv_cold_state=False), load(tiny_model, POLICY)
    state = llm.save_state()
    assert (
        COLD_MAGIC + bytes(4) == state.llama_state[-16:-8]
    )  # behind it is the header of codes, of which there are none
    n_cells, row_bytes = sum(map(len, kept(llm))), native.layer(ctx_of(llm), 0).row_bytes
    with_cold = read(tiny_model).save_state().llama_state_size
    assert with_cold - state.llama_state_size == pytest.approx((4 * len(PROMPT) - n_cells) * (row_bytes + 4), abs=64)
    other.load_state(state)
    assert other.kv_stats.bytes_cold == 0
    with pytest.raises(CacheStateError, match="the state that was loaded did not have them"):
        restore(other)


def test_what_is_no_bool_is_refused() -> None:
    with pytest.raises(PolicyError, match="kv_cold_state='no': must be one of True, False"):
        Llama("no such model", kv_policy="refreekv", kv_cold_state="no")  # type: ignore[arg-type]


# -- when rows cannot be kept, or read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_evicted", ["drop", "recompute"])
def test_a_context_without_a_cold_store_leaves_them_out(tiny_model: Path, kv_evicted: str) -> None:
    saved, other = load(tiny_model, POLICY), load(tiny_model, POLICY, kv_evicted=kv_evicted)
    by_itself = load(tiny_model, POLICY, kv_evicted=kv_evicted)
    answer = generate(saved, PROMPT)
    generate(by_itself, PROMPT)
    other.load_state(saved.save_state())
    assert kept(other) == kept(by_itself)
    assert other.kv_stats.bytes_cold == 0
    with pytest.raises(CacheStateError, match="no cold store"):
        restore(other)
    tokens = [*PROMPT, *answer, *QUESTION]
    assert generate(other, tokens) == generate(by_itself, tokens)
    assert kept(other) == kept(by_itself)


@pytest.mark.parametrize("why", ["limit", "disk"])
def test_what_does_not_fit_is_read_again(tiny_model: Path, why: str) -> None:
    saved = load(tiny_model, POLICY)
    tokens = [*PROMPT, *generate(saved, PROMPT), *QUESTION]
    limit = 50_000
    other = load(tiny_model, POLICY, kv_cold_limit=limit if why == "limit" else None)
    native.fail_cold(0 if why == "limit" else 3)
    other.load_state(saved.save_state())
    native.fail_cold(0)
    assert kept(other) == kept(saved)
    assert other.kv_stats.cold_full
    assert other.kv_stats.bytes_cold <= limit
    with tokens_read(other) as batches:
        generate(other, tokens)
    assert sum(batches) >= len(tokens)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_state_that_cannot_be_saved(tiny_model: Path) -> None:
    # another process has nothing of what is in the file
    script = """
import os, sys
sys.path.insert(0, sys.argv[2])
from restoring import read
from refreekv_cpp import CacheStateError, _closed
llm = read(sys.argv[1], kv_cold="file")
_closed._llamas.clear()  # as if the child may use them
if os.fork() == 0:
    try:
        llm.save_state()
    except CacheStateError as error:
        os._exit(0 if "cannot be read any more" in str(error) else 1)
    os._exit(2)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    command = [sys.executable, "-c", script, str(tiny_model), str(HELPERS)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=60)


def set_state(llm: Llama, state: bytes) -> int:
    """Bytes read; 0: refused."""
    native.clear_error()
    buffer = (ctypes.c_uint8 * max(1, len(state))).from_buffer_copy(state or b"\0")
    return llama_cpp.llama_state_set_data(ctx_of(llm), buffer, len(state))


@pytest.mark.parametrize("cold", COLD)
def test_a_damaged_cold_part_is_refused_and_does_no_harm(tiny_model: Path, cold: str) -> None:
    state = read(tiny_model).save_state().llama_state
    start = state.index(COLD_MAGIC)
    llm = load(tiny_model, POLICY, kv_cold=cold)
    rng = np.random.default_rng(0)
    for n in [*range(start, start + 40, 3), *rng.integers(start, len(state), 20), len(state) - 1]:
        assert set_state(llm, state[:n]) == 0
        assert (llm.kv_stats.n_tokens, llm.kv_stats.bytes_cold) == (0, 0)
    layer, group = 0, start + 8
    while not any(state[group + 4 : group + 8]):  # nothing was evicted from this one
        layer, group = layer + 1, group + 8
    assert state[group : group + 4] == COLD_MAGIC
    for at in [*range(start, start + 8), *range(group, group + 8)]:
        bad = state[:at] + bytes([state[at] ^ 0xFF]) + state[at + 1 :]
        assert set_state(llm, bad) == 0, at - start
        assert "damaged" in native.last_error()
    first, rest = state[group + 8 : group + 12], state[group + 12 : group + 16]
    held = kept(read(tiny_model))[layer][0].to_bytes(4, "little")
    for cells in (first + first, b"\xff" * 8, held + rest, rest + first):
        assert set_state(llm, state[: group + 8] + cells + state[group + 16 :]) == 0
        assert "evicted a cell that is not there or that it holds" in native.last_error()
    assert set_state(llm, state) == len(state)
    restore(llm)
    assert cache_of(llm) == cache_of(read(tiny_model, prune=False))
