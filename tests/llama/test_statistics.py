"""`Llama.kv_stats`: a snapshot without side effects, for any thread, that leads with the memory of the process."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from policies import POLICIES
from support import Sequences, ctx_of, kept, load
from tiny import random_tokens

from refreekv_cpp import ClosedError, KVStats, Llama, ReFreeKV, native
from refreekv_cpp.policies import as_policy

POLICY = ReFreeKV(n_min=0)
PROMPT = random_tokens(1060)


@contextmanager
def read_meanwhile(read: Callable[[], Any]) -> Iterator[tuple[list[Any], threading.Event]]:
    """A second thread reads as often as it can: what it found, and whether it ended. Its error is raised at the end."""
    found: list[Any] = []
    errors: list[Exception] = []
    done, ended = threading.Event(), threading.Event()

    def run() -> None:
        try:
            while not done.is_set():
                found.append(read())
        except Exception as error:
            errors.append(error)
        ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield found, ended
    finally:
        done.set()
        thread.join()
    if errors:
        raise errors[0]


def consistent(stats: KVStats) -> bool:
    """Whether figures of one moment: no layer holds more than there are tokens, nor more than it has room for."""
    return (
        all(n <= min(stats.n_tokens, room) for n, room in zip(stats.cells_kept, stats.cells_capacity, strict=True))
        and stats.bytes_kept <= stats.bytes
        and (stats.n_prunes > 0 or set(stats.cells_kept) == {stats.n_tokens})
    )


@pytest.mark.parametrize(
    "policy", [POLICY, "refreekv", "streaming", "full"], ids=["short", "refreekv", "streaming", "full"]
)
def test_statistics_can_be_read_while_another_thread_generates(tiny_model: Path, policy: Any) -> None:
    # once a segmentation fault: reading pruned, and the native figures were those of a cache in flux
    llm = load(tiny_model, policy, codes=True)
    with read_meanwhile(lambda: llm.kv_stats) as (found, ended):
        for turn in itertools.chain(range(4), itertools.repeat(0)):
            if turn == 0 and (ended.is_set() or len({stats.n_tokens for stats in found}) > 4):
                break
            prompt = [*PROMPT, *random_tokens(200 * turn + 1, seed=turn)[1:]]
            llm.create_completion(prompt, max_tokens=40, temperature=0.0, logit_bias={"100": 50.0})
            llm.load_state(llm.save_state())
            if turn == 1:
                llm.reset()
                llm._ctx.kv_cache_clear()
    assert all(consistent(stats) for stats in found)
    assert found[-1].n_tokens <= llm.n_tokens == llm.kv_stats.n_tokens


@pytest.mark.parametrize("policy", ["full", POLICY], ids=["full", "short"])
def test_statistics_are_never_those_of_half_a_state(tiny_model: Path, policy: Any) -> None:
    # llama.cpp removes the sequence, and then puts one cell after the other in its place
    sequences = Sequences(tiny_model, as_policy(policy))
    states = []
    for n in (600, 1060):
        sequences.read(0, PROMPT[sequences.n_tokens(0) : n])
        states.append(sequences.save(0))
    with read_meanwhile(lambda: native.stats(sequences.ctx).n_tokens) as (found, _):
        for state in states * 150:
            assert sequences.restore(state, 0) == len(state)
    assert set(found) <= {600, 1060}
    assert native.stats(sequences.ctx).n_tokens == 1060
    assert sequences.remove(0)
    assert native.stats(sequences.ctx).n_tokens == 0
    sequences.close()


def test_reading_statistics_changes_nothing(tiny_model: Path) -> None:
    # once it did the pruning that was due
    read, unread = load(tiny_model, POLICY), load(tiny_model, POLICY)
    answers = []
    for llm in (read, unread):
        generator, answer = llm.generate(PROMPT, temp=0.0), []
        for _ in range(5):
            answer.append(next(generator))
            if llm is read:
                n_prunes = len(answer) > 1
                assert read.kv_stats.n_prunes == n_prunes
        answers.append(answer)
        generator.close()
    assert answers[0] == answers[1]
    assert kept(read) == kept(unread)


def stream(llm: Llama, n: int) -> Iterator[Any]:
    chunks: Any = llm.create_completion(PROMPT, max_tokens=n, temperature=0.0, stream=True)
    return chunks


def drop(chunks: Iterator[Any]) -> None:
    next(chunks)
    # and it is gone


ENDS: dict[str, Callable[[Llama], Any]] = {
    "completion": lambda llm: llm.create_completion(PROMPT, max_tokens=8, temperature=0.0),
    "one token": lambda llm: llm.create_completion(PROMPT, max_tokens=1, temperature=0.0),
    "stream": lambda llm: list(stream(llm, 8)),
    "stream by position": lambda llm: list(
        llm.create_completion(PROMPT, None, 1, 0.0, 0.95, 0.05, 1.0, None, False, [], 0.0, 0.0, 1.0, 40, True)
    ),
    "stream of one token": lambda llm: list(stream(llm, 1)),
    "stream, given up": lambda llm: drop(stream(llm, 8)),
    "generation, given up": lambda llm: drop(llm.generate(PROMPT)),
    "chat, given up": lambda llm: drop(
        llm.create_chat_completion([{"role": "user", "content": "a" * 1000}], stream=True, max_tokens=8)
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_pruning_that_is_due_is_done_when_a_generation_ends(tiny_model: Path, end: str) -> None:
    llm = load(tiny_model, POLICY)
    ENDS[end](llm)
    assert native.stats(ctx_of(llm)).n_prunes == 1


@pytest.mark.parametrize("name", POLICIES)
def test_figures_are_those_of_the_end_of_every_operation(tiny_model: Path, name: str) -> None:
    sequences = Sequences(tiny_model, POLICIES[name])

    def check(n_tokens: int) -> None:
        stats, layers = native.figures(sequences.ctx)
        assert stats.n_tokens == n_tokens
        cells = [set(sequences.kept(0)[i]) | {-1 - pos for pos in sequences.kept(1)[i]} for i in range(len(layers))]
        assert [layer.n_kept for layer in layers] == [len(held) for held in cells]
        context = sum(info.bytes_context for _, info in native.buffers(sequences.ctx))
        assert stats.bytes + stats.bytes_ring + stats.bytes_other == context

    check(0)
    sequences.read(0, PROMPT[:600])
    check(600)
    sequences.remove(0, 590)
    check(590)
    sequences.read(1, PROMPT[:100])
    check(690)
    native.prune(sequences.ctx, 0)
    check(690)
    sequences.remove(1)
    check(590)
    sequences.remove(0)
    check(0)
    sequences.close()


def test_the_memory_of_the_process_leads(tiny_model: Path) -> None:
    llm = load(tiny_model, POLICY)
    llm.create_completion(PROMPT, max_tokens=4)
    stats = llm.kv_stats
    memory = stats.memory
    assert memory.rss == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    assert memory.rss_peak is None or memory.rss_peak >= memory.rss * 0.99
    assert memory.weights == sum(buffer.model for buffer in stats.buffers) > 0
    assert memory.compute == sum(buffer.compute for buffer in stats.buffers) > 0
    assert (memory.kv, memory.rings, memory.other) == (stats.bytes, stats.bytes_ring, stats.bytes_other)
    assert stats.as_dict()["memory"]["rss"] == memory.rss
    receipt = stats.receipt()
    assert receipt.startswith("process ")
    assert "\n" not in receipt
    for part in ("(peak ", "weights ", "compute up to ", f" for {stats.n_tokens} tokens (", "pruned once in "):
        assert part in receipt
    found = re.search(r"KV ([\d.]+) for", receipt)
    assert found
    assert float(found[1]) == pytest.approx((stats.bytes + stats.bytes_codes) / 2**20, abs=0.5)


def close_while_read(llm: Llama) -> None:
    with read_meanwhile(lambda: llm.kv_stats) as (found, ended):
        while len(found) < 3:
            time.sleep(0)
        llm.close()
        assert ended.wait(60)


def test_statistics_of_a_llama_that_is_being_closed(tiny_model: Path) -> None:
    for _ in range(5):
        llm = load(tiny_model, POLICY)
        llm.create_completion(PROMPT[:300], max_tokens=2)
        with pytest.raises(ClosedError):
            close_while_read(llm)
