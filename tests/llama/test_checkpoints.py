"""Going back in models with recurrent layers or sliding windows, whose cache cannot be cut at any position.

Regenerating an answer, editing an earlier message or sharing only a part of a prompt had the whole prompt read again
(recurrent layers), or was answered from a window without its rows (`swa_full=False`).
"""

from __future__ import annotations

import errno
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from support import generate, load, logits
from tiny import random_tokens

from refreekv_cpp import Llama, ReFreeKV, Streaming, _checkpoints, _upstream
from refreekv_cpp._checkpoints import N_REQUEST

Tiny = Callable[[str], Path]

WINDOWED = "gemma2 (soft-cap, sliding window)"
HYBRID = "jamba (hybrid)"
MODELS = [WINDOWED, "gpt-oss (attention sinks, sliding window, experts)", HYBRID, "lfm2 (hybrid)"]

# every evicted row is read while decoding, so that an answer is that of whoever reads the whole prompt
EXACT = ReFreeKV(theta=1e-12, n_min=0)
PROMPT = random_tokens(1000)
QUESTION = random_tokens(201, seed=1)[1:]
OTHER = random_tokens(171, seed=2)[1:]
N_ANSWER = 6


def opened(path: Path, **options: Any) -> Llama:
    # with batches of 512, windows of 128 would hold rows of 640 cells, and could be cut where these tests go back to
    return load(path, EXACT, codes=True, n_batch=128, **options)


@contextmanager
def counted(llm: Llama) -> Iterator[list[int]]:
    """The lengths of the batches that are decoded inside."""
    batches: list[int] = []
    with _upstream.after_batches(llm, batches.append):
        yield batches


class Answer(NamedTuple):
    tokens: list[int]  # greedy
    logits: npt.NDArray[np.float32]  # behind the prompt
    n_read: int  # of the prompt


def answer(llm: Llama, prompt: list[int]) -> Answer:
    with counted(llm) as batches:
        generator = llm.generate(prompt, temp=0.0)
        tokens = [next(generator)]
        behind, n_read = logits(llm), sum(batches)
        tokens += itertools.islice(generator, N_ANSWER - 1)
        generator.close()
    return Answer(tokens, behind, n_read)


def assert_as_if_read(path: Path, prompt: list[int], actual: Answer, *, tokens: bool = True, **options: Any) -> None:
    """The answer is that of a Llama that has read the whole prompt.

    tokens: compare these, too.
    """
    llm = opened(path, **options)
    expected = answer(llm, prompt)
    llm.close()
    assert expected.n_read == len(prompt)
    assert np.abs(actual.logits - expected.logits).max() < 0.01 * expected.logits.std()
    assert not tokens or actual.tokens == expected.tokens


@pytest.mark.parametrize("evicted", ["keep", "restore"])
@pytest.mark.parametrize("name", MODELS)
def test_a_conversation_goes_back(tiny: Tiny, name: str, evicted: str) -> None:
    path = tiny(name)
    llm = opened(path, kv_evicted=evicted)
    first = answer(llm, PROMPT)
    assert first.n_read == len(PROMPT)

    again = answer(llm, PROMPT)
    assert again.n_read <= N_REQUEST
    assert_as_if_read(path, PROMPT, again, kv_evicted=evicted)

    turn = [*PROMPT, *first.tokens, *QUESTION]
    second = answer(llm, turn)
    assert second.n_read == len(QUESTION) + 1  # and the answer's last token, which nobody has read
    assert answer(llm, turn).n_read <= N_REQUEST

    edited = [*PROMPT, *first.tokens, *OTHER]
    third = answer(llm, edited)
    assert third.n_read <= len(OTHER) + 1

    part = [*PROMPT[:950], *OTHER]
    fourth = answer(llm, part)
    assert fourth.n_read <= 950 - 896 + len(OTHER)  # a batch began there
    assert llm.kv_stats.n_prunes >= 2
    for prompt, actual in ((turn, second), (edited, third), (part, fourth)):
        assert_as_if_read(path, prompt, actual, kv_evicted=evicted)


@pytest.mark.parametrize("name", MODELS)
def test_a_program_sets_the_number_of_tokens_back(tiny: Tiny, name: str) -> None:
    """Recurrent layers could not be rewound, so the next batch was refused; windows were read without their rows."""
    llm = opened(tiny(name))
    first = answer(llm, PROMPT)
    turn = [*PROMPT, *first.tokens, *random_tokens(300, seed=3)[1:]]
    answer(llm, turn)
    llm.n_tokens = len(PROMPT) + 2
    with counted(llm) as batches:
        llm.eval(OTHER)
    assert len(OTHER) <= sum(batches) <= len(OTHER) + N_REQUEST + 2
    read = [*PROMPT, *first.tokens[:2], *OTHER]
    assert llm.n_tokens == len(read)
    assert_as_if_read(tiny(name), read, Answer([], logits(llm), 0), tokens=False)


def test_drafts_are_refused_by_recurrent_layers_as_well(tiny: Tiny) -> None:
    """The first draft that was not what the model says ended the generation: llama_decode returned -1."""
    alone = opened(tiny(HYBRID))
    drafting = opened(tiny(HYBRID), draft_model=LlamaPromptLookupDecoding(num_pred_tokens=5), logits_all=True)
    with counted(drafting) as batches:
        assert generate(drafting, PROMPT, 30) == generate(alone, PROMPT, 30)
    assert sum(batches) < len(PROMPT) + 300


@pytest.mark.parametrize("name", MODELS)
def test_two_conversations_in_a_cache_of_states(tiny: Tiny, name: str) -> None:
    """Each goes on, and back, from what was read of it."""
    llm = opened(tiny(name))
    llm.set_cache(llama_cpp.LlamaRAMCache())
    prompts = [random_tokens(700, seed=seed) for seed in (5, 6)]
    for _ in range(2):
        for i, prompt in enumerate(prompts):
            with counted(llm) as batches:
                text = llm.create_completion(prompt, max_tokens=N_ANSWER, temperature=0.0)["choices"][0]["text"]
            prompts[i] = [*prompt, *llm.tokenize(text.encode(), add_bos=False), *QUESTION]
    assert sum(batches) <= len(QUESTION) + 3 * N_ANSWER + N_REQUEST
    with counted(llm) as batches:  # the other one's, with another question
        llm.create_completion([*prompts[0][: -len(QUESTION)], *OTHER], max_tokens=1, temperature=0.0)
    assert sum(batches) <= len(OTHER) + len(QUESTION) + 3 * N_ANSWER


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_state_goes_on_and_back(tiny: Tiny, name: str) -> None:
    llm = opened(tiny(name))
    first = answer(llm, PROMPT)
    state = llm.save_state()
    read = llm.input_ids[: llm.n_tokens].tolist()
    other = opened(tiny(name))
    other.load_state(state)
    second = answer(other, [*read, *QUESTION])
    assert second.n_read == len(QUESTION)
    assert_as_if_read(tiny(name), [*read, *QUESTION], second)
    other.load_state(state)
    again = answer(other, PROMPT)  # a state has no checkpoints
    assert again.tokens == first.tokens
    assert_as_if_read(tiny(name), PROMPT, again)
    llm.load_state(state)
    assert answer(llm, PROMPT).n_read <= N_REQUEST  # but this process has them


def test_windows_take_no_memory_for_the_context_unless_it_is_asked_for(tiny: Tiny) -> None:
    path = tiny(WINDOWED)
    few, more = (opened(path, n_ctx=n_ctx).kv_stats.bytes_other for n_ctx in (1024, 8192))
    assert few == more == opened(path, n_ctx=8192, swa_full=None).kv_stats.bytes_other
    assert opened(path, n_ctx=8192, swa_full=True).kv_stats.bytes_other > 4 * few
    full = load(path, "full", n_ctx=8192)
    assert full.context_params.swa_full
    assert full.kv_stats.bytes_other > 4 * few


def test_checkpoints_are_bounded(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = opened(tiny(WINDOWED))
    prompt = PROMPT
    for seed in range(20):
        prompt = [*prompt, *answer(llm, prompt).tokens, *random_tokens(41, seed=seed)[1:]]
    stats = llm.kv_stats
    assert stats.bytes_checkpoints > 0
    taken = sorted(len(checkpoint.tokens) for checkpoint in llm._checkpoints._all)
    assert len(taken) == _checkpoints.N_MOST
    assert taken[0] < len(PROMPT)  # the beginning is not forgotten, and
    assert len([at for at in taken if at > len(PROMPT) + 460]) > 10  # most are of the last turns

    monkeypatch.setattr(_checkpoints, "BYTES_MOST", stats.bytes_checkpoints // 4)
    answer(llm, prompt)
    assert llm.kv_stats.bytes_checkpoints <= stats.bytes_checkpoints // 4
    monkeypatch.setattr(_checkpoints, "BYTES_MOST", 1)
    answer(llm, random_tokens(600, seed=9))
    assert len(llm._checkpoints._all) == _checkpoints.N_ALWAYS
    assert answer(llm, random_tokens(600, seed=9)).n_read <= N_REQUEST


def test_a_long_prompt_has_checkpoints_inside(tiny: Tiny) -> None:
    llm = opened(tiny(HYBRID), n_ctx=8192)
    prompt = random_tokens(6000)
    answer(llm, prompt)
    assert [len(checkpoint.tokens) for checkpoint in llm._checkpoints._all] == [2048, 4096, 5888, 6000 - N_REQUEST]
    assert answer(llm, [*prompt[:4500], *OTHER]).n_read == 4500 - 4096 + len(OTHER)


@pytest.mark.parametrize("cold", ["file", "memory"])
def test_they_are_where_the_cold_store_is(tiny: Tiny, tmp_path: Path, cold: str) -> None:
    llm = opened(tiny(HYBRID), kv_cold=cold, kv_cold_dir=tmp_path)
    answer(llm, PROMPT)
    stats = llm.kv_stats
    assert stats.memory.checkpoints == (stats.bytes_checkpoints if cold == "memory" else 0)
    assert answer(llm, PROMPT).n_read == N_REQUEST
    assert not list(tmp_path.iterdir())


def test_a_full_disk_and_a_file_that_cannot_be_read(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = opened(tiny(HYBRID), kv_cold="file", kv_cold_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", no_room)
        first = answer(llm, PROMPT)
    assert llm.kv_stats.memory.checkpoints == llm.kv_stats.bytes_checkpoints > 0
    assert answer(llm, PROMPT).n_read == N_REQUEST
    llm.reset()
    again = answer(llm, PROMPT)  # into files
    assert again.tokens == first.tokens
    for checkpoint in llm._checkpoints._all:
        checkpoint.file.truncate(10)
    assert answer(llm, PROMPT).n_read == len(PROMPT)
    assert_as_if_read(tiny(HYBRID), PROMPT, again)


def no_room(**_: Any) -> None:
    raise OSError(errno.ENOSPC, "no space left on device")


@pytest.mark.parametrize("name", MODELS)
def test_a_vocabulary_alone_needs_none(tiny: Tiny, name: str) -> None:
    assert opened(tiny(name), vocab_only=True).n_vocab() > 0


@pytest.mark.parametrize("options", [{"n_batch": 1}, {"n_batch": 2048}, {"kv_memory_limit": "1MiB"}], ids=str)
def test_few_are_taken_in_any_batches(tiny: Tiny, options: dict[str, Any]) -> None:
    llm = load(tiny(HYBRID), EXACT, codes=True, **{"n_batch": 64, **options})
    answer(llm, PROMPT)
    assert len(llm._checkpoints._all) <= 2
    assert answer(llm, PROMPT).n_read == N_REQUEST


@pytest.mark.parametrize("name", [WINDOWED, HYBRID])
def test_the_second_part_of_a_last_batch_may_have_no_room(tiny: Tiny, name: str) -> None:
    """A prompt's last batch is read in two parts, with a checkpoint between: what had been read was read once more."""
    policy, prompt = Streaming(budget=64, n_min=0), random_tokens(1036)
    n_bytes = load(tiny(name), policy).kv_stats.bytes_per_token * 1024  # 1020 of them fit
    llm = load(tiny(name), policy, n_batch=200, kv_memory_limit=n_bytes)
    assert answer(llm, prompt).n_read == len(prompt)
    assert llm.kv_stats.n_limit_prunes == 1
    assert llm.input_ids[: len(prompt)].tolist() == prompt
