"""What was evicted comes back: bit for bit, or the conversation is read again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from policies import POLICIES
from restoring import CACHES, COLD, MORE, POLICY, PROMPT, cache_of, read, restore
from support import HELPERS, Sequences, ctx_of, feed, generate, kept, load
from tiny import random_tokens

from refreekv_cpp import CacheMemoryError, CacheStateError, Llama, PolicyError, Streaming, native

Tiny = Callable[[str], Path]

QUESTION = random_tokens(60, seed=2)


@pytest.fixture(autouse=True)
def all_writes_work() -> Iterator[None]:
    yield
    native.fail_cold(0)
    native.fail_allocation(0)


# -- bit for bit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", CACHES, ids=str)
@pytest.mark.parametrize("cold", COLD)
def test_a_restored_cache_is_the_one_that_was_pruned(tiny: Tiny, cold: str, options: dict) -> None:
    llms = []
    for prune in (True, False):
        llm = load(tiny("gqa64"), POLICY, kv_cold=cold, **options)
        llm.eval(PROMPT)
        if prune:
            n_evicted = llm.prune_kv()
            assert n_evicted > 0
            assert llm.kv_stats.bytes_cold == llm.kv_stats.bytes_full - llm.kv_stats.bytes_kept
            assert llm.kv_stats.cold == cold
            assert restore(llm) == n_evicted
        llms.append(llm)
    back, never = llms
    assert cache_of(back) == cache_of(never)
    assert back.kv_stats.bytes == never.kv_stats.bytes
    assert back.kv_stats.n_layouts == 1
    assert back.kv_stats.n_restores == 1
    np.testing.assert_array_equal(feed(back, MORE), feed(never, MORE))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_evicts_to_the_cold_store(tiny_model: Path, name: str) -> None:
    if name == "full":
        pytest.skip("evicts nothing")
    llm, never = read(tiny_model, policy=POLICIES[name]), read(tiny_model, prune=False)
    restore(llm)
    np.testing.assert_array_equal(feed(llm, MORE), feed(never, MORE))


@pytest.mark.parametrize("options", CACHES, ids=str)
@pytest.mark.parametrize("cold", COLD)
def test_several_threads_bring_it_back(tiny: Tiny, cold: str, options: dict) -> None:
    path = tiny("gqa64")
    llm, never = (read(path, prune=prune, kv_cold=cold, n_threads_batch=4, **options) for prune in (True, False))
    n_evicted = sum(len(PROMPT) - len(layer) for layer in kept(llm))
    assert restore(llm) == n_evicted
    assert cache_of(llm) == cache_of(never)


def test_rows_that_a_graph_moves_come_back_too(tiny_model: Path) -> None:
    from policies import Debug

    llm, never = read(tiny_model, policy=Debug(policy=POLICY, by_graph=True)), read(tiny_model, prune=False)
    assert restore(llm) > 0
    assert cache_of(llm) == cache_of(never)


@pytest.mark.parametrize("kv_evicted", ["restore", "drop"])
def test_hidden_cells_are_seen_again(tiny_model: Path, kv_evicted: str) -> None:
    from policies import Debug

    policy = Debug(policy=POLICY, mask_only=True)
    llm, never = read(tiny_model, policy=policy, kv_evicted=kv_evicted), read(tiny_model, prune=False)
    assert restore(llm) > 0
    np.testing.assert_array_equal(feed(llm, MORE), feed(never, MORE))


def test_what_was_decoded_since_stays(tiny_model: Path) -> None:
    llm = read(tiny_model)
    feed(llm, MORE)
    before = [set(layer) for layer in kept(llm)]
    restore(llm)
    everything = list(range(len(PROMPT) + len(MORE)))
    assert kept(llm) == [everything] * len(before)
    assert native.pruned_pos(ctx_of(llm), 0) == -1


def test_nothing_to_restore_is_no_error(tiny_model: Path) -> None:
    llm = read(tiny_model, prune=False)
    assert restore(llm) == 0
    assert llm.kv_stats.n_restores == 0


# -- turns -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["refreekv", "paper", "streaming"])
def test_the_next_turn_has_everything_and_is_pruned_again(tiny_model: Path, name: str) -> None:
    llm, by_hand = (load(tiny_model, POLICIES[name]) for _ in range(2))
    assert llm.kv_evicted == "keep"  # without codes there is nothing else to go on from
    answer = generate(llm, PROMPT)
    tokens = [*PROMPT, *answer, *QUESTION]
    second = generate(llm, tokens)

    by_hand.eval(PROMPT)
    by_hand.prune_kv()
    feed(by_hand, answer[:-1])  # the last one was sampled and not read
    restore(by_hand)
    by_hand.eval(tokens[by_hand.n_tokens :])
    by_hand.prune_kv()
    assert [layer[: len(positions)] for layer, positions in zip(kept(llm), kept(by_hand), strict=True)] == kept(by_hand)
    assert generate(by_hand, tokens) == second
    assert llm.kv_stats.n_prunes == 2
    assert llm.kv_stats.n_restores == 1


@pytest.mark.parametrize("n_same", [1, 300, 699])
def test_an_earlier_message_can_be_edited(tiny_model: Path, n_same: int) -> None:
    llm, fresh = load(tiny_model, POLICY), load(tiny_model, POLICY)
    generate(llm, PROMPT)
    prompt = [*PROMPT[:n_same], *QUESTION, *MORE]
    fresh.eval(PROMPT[:n_same])  # batches as they were
    assert generate(llm, prompt) == generate(fresh, prompt)
    assert kept(llm) == kept(fresh)


@pytest.mark.parametrize("n_answer", [6, 150])
def test_an_answer_generated_again_is_pruned_by_the_same_queries(tiny_model: Path, n_answer: int) -> None:
    llm = load(tiny_model, POLICY)
    answer = generate(llm, PROMPT, n=n_answer)
    after = [[pos for pos in layer if pos < len(PROMPT)] for layer in kept(llm)]
    assert generate(llm, PROMPT, n=6) == answer[:6]
    assert [[pos for pos in layer if pos < len(PROMPT)] for layer in kept(llm)] == after
    assert llm.kv_stats.n_restores == 1


def test_rewinding_into_the_pruned_range(tiny_model: Path) -> None:
    llm, never = read(tiny_model), read(tiny_model, prune=False)
    feed(llm, MORE)
    for each in (llm, never):
        each.n_tokens = 500
    np.testing.assert_array_equal(feed(llm, MORE), feed(never, MORE))


def test_the_same_prompt_again_is_sampled_from_at_once(tiny_model: Path) -> None:
    llm = load(tiny_model, POLICY)
    answer = generate(llm, PROMPT, n=1)
    assert generate(llm, PROMPT, n=1) == answer
    assert llm.kv_stats.n_restores == 0


def test_a_new_conversation_forgets_the_old_one(tiny_model: Path) -> None:
    llm = load(tiny_model, POLICY)
    generate(llm, PROMPT)
    assert llm.kv_stats.bytes_cold > 0
    generate(llm, MORE)
    assert llm.kv_stats.bytes_cold == 0


# -- the store ---------------------------------------------------------------------------------------------------------


def test_memory_is_not_held_twice(tiny_model: Path) -> None:
    llm = read(tiny_model, kv_cold="memory")
    assert llm.kv_stats.bytes_cold > 0
    restore(llm)
    assert llm.kv_stats.bytes_cold == 0


def test_what_is_in_the_file_is_not_written_again(tiny_model: Path) -> None:
    llm = read(tiny_model, kv_cold="file")
    n_bytes, after = llm.kv_stats.bytes_cold, kept(llm)
    restore(llm)
    native.fail_cold(1)
    llm.prune_kv()
    assert kept(llm) == after
    assert llm.kv_stats.bytes_cold == n_bytes
    assert not llm.kv_stats.cold_full
    restore(llm)
    assert cache_of(llm) == cache_of(read(tiny_model, prune=False))


def test_rows_of_removed_tokens_are_not_taken_for_those_in_their_place(tiny_model: Path) -> None:
    llm = read(tiny_model, kv_cold="file")
    llm.n_tokens = 100
    other = random_tokens(600, seed=9)
    llm.eval(other)
    llm.prune_kv()
    restore(llm)
    never = load(tiny_model, POLICY)
    never.eval(PROMPT)
    never.n_tokens = 100
    never.eval(other)
    assert cache_of(llm) == cache_of(never)


def test_drop_and_recompute_keep_nothing(tiny_model: Path) -> None:
    for kv_evicted in ("drop", "recompute"):
        llm = read(tiny_model, kv_evicted=kv_evicted)
        assert (llm.kv_stats.cold, llm.kv_stats.bytes_cold) == ("", 0)
        with pytest.raises(CacheStateError, match="no cold store"):
            restore(llm)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kv_cold": "disk"}, "kv_cold='disk': must be one of 'auto', 'memory', 'file'"),
        ({"kv_cold_limit": "much"}, "kv_cold_limit='much': must be a positive number of bytes"),
        ({"kv_cold_dir": "/nowhere/at/all"}, "not a folder that can be written"),
    ],
)
def test_what_is_not_valid_is_said_before_any_work(options: dict[str, str], reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        Llama("no such model", kv_policy="refreekv", **options)  # type: ignore[arg-type]


def test_the_file_has_no_name(tiny_model: Path, tmp_path: Path) -> None:
    llm = read(tiny_model, kv_cold="file", kv_cold_dir=tmp_path)
    assert llm.kv_stats.bytes_cold > 0
    assert list(tmp_path.iterdir()) == []


# one process after the other, forked off before there is a model, is killed at some moment of its spilling
KILLS = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[3])
from restoring import PROMPT
from support import load
from refreekv_cpp import Streaming
from refreekv_cpp import _closed

def spill(spills):
    llm = load(sys.argv[1], Streaming(budget=0.1, n_min=0), kv_cold="file", kv_cold_dir=sys.argv[2])
    llm.eval(PROMPT)
    whole = llm.save_state()
    while True:
        os.write(spills, b"+")
        llm.prune_kv()
        os.write(spills, b"-")
        llm.load_state(whole)

rng = random.Random(0)
n_during = 0
for _ in range(int(sys.argv[4])):
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            spill(writing)
        finally:
            os._exit(1)
    os.close(writing)
    written = os.read(reading, 1)
    time.sleep(rng.random() * 0.01)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    n_during += (written + os.read(reading, 1 << 20)).endswith(b"+")
    os.close(reading)
    assert os.listdir(sys.argv[2]) == []
print(n_during)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_processes_that_are_killed_leave_no_file(tiny_model: Path, tmp_path: Path) -> None:
    n_kills = 50
    command = [sys.executable, "-c", KILLS, str(tiny_model), str(tmp_path), str(HELPERS), str(n_kills)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, timeout=100)
    assert int(done.stdout) > n_kills / 10  # were killed in the middle of a pruning
    llm, never = (read(tiny_model, prune=prune, kv_cold="file", kv_cold_dir=tmp_path) for prune in (True, False))
    restore(llm)
    assert cache_of(llm) == cache_of(never)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_process_that_was_forked_off_leaves_the_file_alone(tiny_model: Path) -> None:
    script = """
import os, sys
sys.path.insert(0, sys.argv[2])
from restoring import cache_of, read, restore
from tiny import random_tokens
from refreekv_cpp import _closed
llm = read(sys.argv[1], kv_cold="file")
never = read(sys.argv[1], prune=False)
_closed._llamas.clear()  # as if the child may use them
if os.fork() == 0:
    llm.reset()
    llm.eval(random_tokens(700, seed=5))
    llm.prune_kv()
    os._exit(0 if llm.kv_stats.cold_full else 1)
assert os.wait()[1] == 0
restore(llm)
assert cache_of(llm) == cache_of(never)
"""
    command = [sys.executable, "-c", script, str(tiny_model), str(HELPERS)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("n_threads", [1, 4])
def test_rows_that_cannot_be_read_are_not_seen(tiny_model: Path, n_threads: int) -> None:
    script = """
import os, sys
sys.path.insert(0, sys.argv[2])
import numpy as np, pytest
from restoring import MORE, read, restore
from support import feed, kept
from refreekv_cpp import CacheStateError, _closed
llm, other = (read(sys.argv[1], kv_cold="file", n_threads_batch=int(sys.argv[3])) for _ in range(2))
expected, before = feed(other, MORE), kept(llm)
_closed._llamas.clear()  # as if the child may use them
if os.fork() == 0:  # it has nothing of what is in the file
    with pytest.raises(CacheStateError, match="cannot be read any more"):
        restore(llm)
    assert kept(llm) == before
    np.testing.assert_array_equal(feed(llm, MORE).argmax(axis=1), expected.argmax(axis=1))
    assert llm.kv_stats.bytes == other.kv_stats.bytes  # nor is there room for them any more
    os._exit(0)
assert os.wait()[1] == 0
"""
    command = [sys.executable, "-c", script, str(tiny_model), str(HELPERS), str(n_threads)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=60)


# -- when rows are lost ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"kv_cold_limit": 50_000}, {"kv_cold_limit": 1}], ids=str)
def test_what_does_not_fit_is_read_again(tiny_model: Path, options: dict[str, Any]) -> None:
    llm, recompute = load(tiny_model, POLICY, **options), load(tiny_model, POLICY, kv_evicted="recompute")
    prompts = [PROMPT, [*PROMPT, *generate(recompute, PROMPT), *QUESTION]]
    assert generate(llm, PROMPT) == prompts[1][len(PROMPT) : -len(QUESTION)]
    assert llm.kv_stats.cold_full
    assert llm.kv_stats.bytes_cold <= options["kv_cold_limit"]
    with pytest.raises(CacheStateError, match="no room"):
        restore(llm)
    assert generate(llm, prompts[1]) == generate(recompute, prompts[1])
    assert kept(llm) == kept(recompute)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("cold", COLD)
def test_a_write_that_fails(tiny_model: Path, cold: str, n: int) -> None:
    """... as on a full disk: the turn goes on, nothing is wrong afterwards."""
    llm, other = load(tiny_model, POLICY, kv_cold=cold), load(tiny_model, POLICY, kv_evicted="recompute")
    native.fail_cold(n)
    answer = generate(llm, PROMPT)
    native.fail_cold(0)
    assert answer == generate(other, PROMPT)
    assert llm.kv_stats.cold_full
    tokens = [*PROMPT, *answer, *QUESTION]
    assert generate(llm, tokens) == generate(other, tokens)


@pytest.mark.parametrize("n_threads", [1, 4])
def test_no_memory_for_what_comes_back(tiny_model: Path, n_threads: int) -> None:
    never = read(tiny_model, prune=False)
    for n in (1, 2):  # two layers have something to get back
        llm = read(tiny_model, n_threads_batch=n_threads)
        native.fail_allocation(n)
        with pytest.raises(CacheMemoryError, match="no memory"):
            restore(llm)
        native.fail_allocation(0)
        assert native.pruned_pos(ctx_of(llm), 0) == len(PROMPT) - 1
        assert np.isfinite(feed(llm, MORE[:2])).all()
        llm._ctx.kv_cache_seq_rm(0, len(PROMPT), -1)
        restore(llm)
        assert cache_of(llm) == cache_of(never)


def test_the_memory_limit_holds_for_what_comes_back(tiny_model: Path) -> None:
    prompt = random_tokens(1500)
    limit = 600_000  # of 786,432 for all of them
    llm = load(tiny_model, Streaming(budget=0.3, n_min=0), kv_memory_limit=limit)
    answer = generate(llm, prompt)
    with pytest.raises(CacheMemoryError, match="the limit is"):
        restore(llm)
    assert len(generate(llm, [*prompt, *answer, *QUESTION])) == 6
    assert llm.kv_stats.n_restores == 0
    assert llm.kv_stats.bytes <= limit


# -- several sequences -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["unified", "streams"])
def sequences(request: pytest.FixtureRequest, tiny_model: Path) -> Sequences:
    unified = request.param == "unified"
    cold = {"cold": native.enum_value("COLD_MEMORY")}
    return Sequences(tiny_model, POLICY, cold=cold, kv_unified=unified, n_ctx=2048 if unified else 4096)


def test_one_sequence_comes_back_and_the_other_stays_pruned(sequences: Sequences) -> None:
    sequences.read(0, PROMPT)
    sequences.read(1, PROMPT[:600])
    assert native.prune(sequences.ctx, 0) > 0
    assert native.prune(sequences.ctx, 1) > 0
    after = sequences.kept(1)
    native.restore(sequences.ctx, 0)
    assert sequences.kept(0) == [list(range(len(PROMPT)))] * 4
    assert sequences.kept(1) == after
    assert native.pruned_pos(sequences.ctx, 1) == 599


def test_a_copy_can_be_restored_when_the_original_is_gone(sequences: Sequences, tiny_model: Path) -> None:
    alone = Sequences(tiny_model, POLICY)
    alone.read(0, PROMPT)
    sequences.read(0, PROMPT)
    native.prune(sequences.ctx, 0)
    sequences.copy(0, 1)
    assert sequences.remove(0)
    native.restore(sequences.ctx, 1)
    assert sequences.kept(1) == [list(range(len(PROMPT)))] * 4
    expected = alone.read(0, MORE)
    np.testing.assert_allclose(sequences.read(1, MORE), expected, atol=1e-4 * expected.std())


def test_a_removal_that_one_sequence_refuses_leaves_all_as_whole_as_they_say(tiny_model: Path) -> None:
    sequences = Sequences(tiny_model, POLICY, cold={"cold": native.enum_value("COLD_MEMORY")})
    sequences.read(0, PROMPT)
    sequences.read(1, PROMPT[:600])
    native.prune(sequences.ctx, 0)
    native.fail_cold(1)
    native.prune(sequences.ctx, 1)
    native.fail_cold(0)
    assert not sequences.remove(-1, 100, 650)
    for seq_id, n_tokens in ((0, 700), (1, 600)):
        whole = sequences.kept(seq_id) == [list(range(n_tokens))] * 4
        assert whole == (native.pruned_pos(sequences.ctx, seq_id) == -1)


def test_a_part_of_a_pruned_sequence_can_be_copied_and_removed(tiny_model: Path) -> None:
    cold = {"cold": native.enum_value("COLD_MEMORY")}
    sequences, alone = Sequences(tiny_model, POLICY, cold=cold), Sequences(tiny_model, POLICY)
    sequences.read(0, PROMPT)
    native.prune(sequences.ctx, 0)
    sequences.copy(0, 1, 0, 500)
    assert sequences.n_tokens(1) == 500
    alone.read(0, PROMPT[:500])
    expected = alone.read(0, MORE)
    np.testing.assert_allclose(sequences.read(1, MORE), expected, atol=1e-4 * expected.std())

    native.prune(sequences.ctx, 1)
    assert sequences.remove(1, 500)
    np.testing.assert_allclose(sequences.read(1, MORE), expected, atol=1e-4 * expected.std())
