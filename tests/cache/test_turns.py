"""Sequences that prune and restore by themselves as a conversation goes on (native/cache/turn.h)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Sequences, ctx_of, load
from tiny import random_tokens

from refreekv_cpp import Policy, PolicyError, ReFreeKV, SnapKV, Streaming, native
from refreekv_cpp.policies import Full

NONE, DROP, RESTORE = (native.enum_value(f"TURNS_{name}") for name in ("NONE", "DROP", "RESTORE"))
MEMORY = native.enum_value("COLD_MEMORY")

# every evicted row is read while decoding, so that the answer is the full cache's
EXACT = ReFreeKV(theta=1e-12)

# in one batch: how many tokens of which sequence. More than 32 are a prompt
CONVERSATIONS = [
    {0: 700},
    {0: 1},
    {0: 1, 1: 900},
    {0: 5, 1: 1},
    {1: 1, 2: 600, 3: 800},
    {0: 100, 2: 1},
    {0: 1, 1: 1, 2: 1, 3: 1},
    {0: 1, 1: 40, 2: 1, 3: 300},
    {0: 1, 1: 32, 2: 1, 3: 1},
    {0: 50, 1: 50, 2: 50, 3: 50},
    {0: 1, 1: 1, 2: 1, 3: 1},
]


@pytest.fixture(autouse=True)
def all_writes_work() -> Iterator[None]:
    yield
    native.fail_cold(0)


def conversation(path: Path, policy: Policy, turns: int = RESTORE, **cold: Any) -> Sequences:
    cold = {"cold": MEMORY, "turns": turns, **cold} if policy != Full() else {}
    return Sequences(path, policy, codes=True, cold=cold, n_ctx=8192, n_batch=2048, n_seq_max=4)


def state(sequences: Sequences) -> tuple[int, int, int]:
    stats = native.stats(sequences.ctx)
    return stats.n_prunes, stats.n_restores, stats.n_turns_failed


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("kind", ["gqa", "gemma2 (soft-cap, sliding window)", "jamba (hybrid)"])
def test_each_sequence_prunes_and_restores_by_itself(tiny: Callable[[str], Path], kind: str, unified: bool) -> None:
    fields = {"n_ctx": 8192, "n_batch": 2048, "n_seq_max": 4, "kv_unified": unified}
    ours = Sequences(tiny(kind), EXACT, codes=True, cold={"cold": MEMORY, "turns": RESTORE}, **fields)
    full = Sequences(tiny(kind), Full(), **fields)
    restored = 0
    for step, lengths in enumerate(CONVERSATIONS):
        tokens = {seq: random_tokens(n, seed=10 * step + seq) for seq, n in lengths.items()}
        was_pruned = {seq: native.pruned_pos(ours.ctx, seq) >= 0 for seq in lengths}
        expected = full.read_together(tokens)
        for seq, logits in ours.read_together(tokens).items():
            assert np.abs(logits - expected[seq]).max() <= 5e-5 * np.abs(expected[seq]).max(), (step, seq)
            is_prompt = lengths[seq] > 32
            assert (native.pruned_pos(ours.ctx, seq) == -1) == is_prompt, (step, seq)
            assert native.is_due(ours.ctx, seq) == is_prompt
            restored += is_prompt and was_pruned[seq]
    assert state(ours)[1:] == (restored, 0)
    assert restored == 7
    assert state(ours)[0] >= 4 + restored


def test_what_the_mode_is_about(tiny_model: Path) -> None:
    """The first token of the answer is out before the pruning, and a mode that drops restores nothing."""
    for turns in (NONE, DROP, RESTORE):
        sequences = conversation(tiny_model, SnapKV(budget=300, n_min=0), turns)
        sequences.read(0, random_tokens(700))
        assert state(sequences) == (0, 0, 0)
        sequences.read(0, [5])
        assert state(sequences) == (int(turns != NONE), 0, 0)
        sequences.read(0, [6])
        sequences.read(0, random_tokens(300, seed=1))
        assert state(sequences) == (int(turns != NONE), int(turns == RESTORE), 0)
        sequences.read(0, [7])
        assert state(sequences) == (2 * (turns != NONE), int(turns == RESTORE), 0)
        whole = turns == NONE
        assert (len(sequences.kept(0)[0]) == 1003) == whole


def test_a_prompt_that_was_announced_may_come_in_any_batches(tiny_model: Path) -> None:
    sequences = conversation(tiny_model, Streaming(budget=100, n_min=0))
    for seq in (0, 1):
        sequences.read(seq, random_tokens(500))
        sequences.read(seq, [5])
    assert state(sequences) == (2, 0, 0)
    native.prompt(sequences.ctx, 0, 25)
    sequences.read_together({0: random_tokens(20), 1: [6]})
    sequences.read_together({0: random_tokens(5), 1: [7]})
    assert state(sequences) == (2, 1, 0)
    sequences.read_together({0: [8], 1: [8]})
    assert state(sequences) == (3, 1, 0)
    native.prompt(sequences.ctx, 0, 100)
    sequences.read(0, [9])
    native.prompt(sequences.ctx, 0, -1)  # it is given up
    sequences.read(0, [10])
    assert state(sequences) == (3, 2, 0)


def test_a_program_that_prunes_itself_is_told_when(tiny_model: Path) -> None:
    sequences = conversation(tiny_model, Streaming(budget=100, n_min=0), NONE)
    sequences.read(0, random_tokens(500))  # nobody said that this is a prompt
    assert not native.is_due(sequences.ctx, 0)
    native.prompt(sequences.ctx, 0, 60)
    sequences.read(0, random_tokens(60))
    assert native.is_due(sequences.ctx, 0)
    sequences.read(0, [5])
    assert native.is_due(sequences.ctx, 0)
    assert state(sequences) == (0, 0, 0)
    assert native.prune(sequences.ctx, 0) > 0
    assert not native.is_due(sequences.ctx, 0)
    native.prompt(sequences.ctx, 0, 0)  # all of it is there, and was pruned
    assert not native.is_due(sequences.ctx, 0)
    sequences.read(0, [6])
    native.prompt(sequences.ctx, 0, 0)
    assert native.is_due(sequences.ctx, 0)
    with pytest.raises(PolicyError, match="must be a sequence of this context"):
        native.is_due(sequences.ctx, 10**6)
    with pytest.raises(PolicyError, match="must be a sequence of this context, and -1 or more"):
        native.prompt(sequences.ctx, 0, -2)


def test_queries_that_are_gone_are_read_again(tiny_model: Path) -> None:
    looks, codes = SnapKV(budget=300, n_min=0, n_window=32), EXACT
    for policy in (looks, codes, Streaming()):
        sequences = conversation(tiny_model, policy, NONE)
        sequences.read(0, random_tokens(500))

        def usable(n_prefix: int, n_prompt: int, ctx: Any = sequences.ctx) -> int:
            return native.usable_prefix(ctx, 0, n_prefix, n_prompt)

        assert usable(500, 500) == usable(500, 520) == 500
        assert usable(480, 500) == 480  # 468 to 499 are there
        assert usable(460, 500) == 460  # none of them is needed: 468 and later are still to be read
        assert usable(450, 470) == (438 if policy is looks else 450)
        state = sequences.save(0)
        assert sequences.remove(0)
        assert sequences.restore(state, 0)
        assert usable(500, 520) == (488 if policy is looks else 500)
    with pytest.raises(PolicyError, match="0 <= n_prefix <= n_prompt"):
        usable(10, 9)


def test_what_becomes_of_a_sequence_becomes_of_its_turn(tiny_model: Path) -> None:
    sequences = conversation(tiny_model, Streaming(budget=100, n_min=0))
    sequences.read(0, random_tokens(500))
    sequences.copy(0, 1)
    assert native.is_due(sequences.ctx, 1)
    assert sequences.remove(0)
    assert not native.is_due(sequences.ctx, 0)
    sequences.read_together({0: [5], 1: [5]})
    assert native.pruned_pos(sequences.ctx, 0) == -1
    assert native.pruned_pos(sequences.ctx, 1) == 499


def test_a_prompt_that_takes_anothers_place_is_pruned_as_well(tiny_model: Path) -> None:
    sequences = conversation(tiny_model, Streaming(budget=100, n_min=0))
    sequences.read(0, random_tokens(700))
    sequences.read(0, [5])
    assert sequences.remove(0, 650)
    assert state(sequences) == (1, 1, 0)
    sequences.read(0, random_tokens(50, seed=1))
    sequences.read(0, [5])
    assert state(sequences) == (2, 1, 0)


def test_short_prompts_stay_whole(tiny_model: Path) -> None:
    sequences = conversation(tiny_model, Streaming(budget=100, n_min=600))
    sequences.read(0, random_tokens(500))
    sequences.read(0, [5])
    assert state(sequences) == (0, 0, 0)
    sequences.read(0, random_tokens(200))
    sequences.read(0, [5])
    assert state(sequences) == (1, 0, 0)


def test_where_rows_were_lost_the_prompt_goes_on_from_what_is_left(tiny_model: Path) -> None:
    dropping, losing = (conversation(tiny_model, SnapKV(budget=300, n_min=0), turns) for turns in (DROP, RESTORE))
    native.fail_cold(2)
    for n, tokens in enumerate([random_tokens(700), [5], random_tokens(600, seed=1), random_tokens(600, seed=2), [6]]):
        assert np.array_equal(losing.read(0, tokens), dropping.read(0, tokens)), n
    assert native.stats(losing.ctx).cold_full
    assert state(losing) == (2, 0, 1)  # it was tried once for the prompt
    assert losing.kept(0) == dropping.kept(0)


@pytest.mark.parametrize("n_answer", [100, 20], ids=["nor without the prompt", "but without the prompt"])
def test_where_it_does_not_fit_the_prompt_goes_on_from_what_is_left(tiny_model: Path, n_answer: int) -> None:
    whole = conversation(tiny_model, Streaming(budget=100, n_min=0))
    whole.read(0, random_tokens(700))
    limit = native.stats(whole.ctx).bytes

    sequences = conversation(tiny_model, Streaming(budget=100, n_min=0), memory_limit=limit)
    sequences.read(0, random_tokens(700))
    for token in random_tokens(n_answer, seed=1):
        sequences.read(0, [token])
    assert state(sequences) == (1, 0, 0)
    sequences.read(0, random_tokens(300, seed=2))
    assert "the limit is" in native.last_error()
    assert state(sequences) == (1, 0, 1)
    sequences.read(0, [6])
    assert state(sequences) == (2, 0, 1)


def test_a_pruning_that_fails_is_not_tried_again(tiny_model: Path) -> None:
    sequences = conversation(tiny_model, SnapKV(budget=300, n_min=0))
    sequences.read(0, random_tokens(700))
    sequences.copy(0, 1)  # its queries are those of the other
    sequences.read(1, [5])
    assert "the last query of sequence 1 is not there any more" in native.last_error()
    assert state(sequences) == (0, 0, 1)
    sequences.read(1, [6])
    assert state(sequences) == (0, 0, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"turns": 3}, "turns: must be none, drop or restore"),
        ({"turns": DROP, "policy": native.ELASTIC}, "turns: must be none for this policy"),
        ({"turns": DROP, "policy": native.enum_value("POLICY_CALLER")}, "turns: must be none for this policy"),
    ],
)
def test_bad_modes_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(PolicyError, match=message), native.next_context(native.make_params(**fields)):
        pass


def test_a_short_question_is_read_by_a_whole_cache(tiny_model: Path) -> None:
    """`Llama` says what is a prompt: once ten tokens were taken for an answer, before which all was coded again."""
    llm = load(tiny_model, EXACT, codes=True, kv_evicted="restore")
    tokens = random_tokens(900)
    first = llm.generate(tokens, temp=0.0)
    tokens += [next(first), next(first)]
    first.close()
    assert native.pruned_pos(ctx_of(llm), 0) == 899

    second = llm.generate([*tokens, *random_tokens(10, seed=1)], temp=0.0)
    next(second)
    assert native.pruned_pos(ctx_of(llm), 0) == -1
    next(second)
    assert native.pruned_pos(ctx_of(llm), 0) == 911
