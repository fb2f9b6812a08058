"""Going back in models with recurrent layers or sliding windows, whose cache cannot be cut at any position.

Regenerating an answer, editing an earlier message or sharing only a part of a prompt had the whole prompt read again
(recurrent layers), or was answered from a window without its rows (`swa_full=False`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from support import load, logits
from tiny import random_tokens

from refreekv_cpp import Llama, ReFreeKV, _upstream
from refreekv_cpp._checkpoints import N_REQUEST

Tiny = Callable[[str], Path]

WINDOWED = "gemma2 (soft-cap, sliding window)"
HYBRID = "jamba (hybrid)"
MODELS = [WINDOWED, "gpt-oss (attention sinks, sliding window, experts)", HYBRID, "lfm2 (hybrid)"]

# every evicted row is read while decoding, so that an answer is that of whoever reads the whole prompt
EXACT = ReFreeKV(theta=1e-12, n_min=0)
PROMPT = random_tokens(1000)
QUESTION = random_tokens(41, seed=1)[1:]
OTHER = random_tokens(31, seed=2)[1:]
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


def assert_as_if_read(path: Path, prompt: list[int], actual: Answer, **options: Any) -> None:
    """The answer is that of a Llama that has read the whole prompt."""
    llm = opened(path, **options)
    expected = answer(llm, prompt)
    llm.close()
    assert expected.n_read == len(prompt)
    assert np.abs(actual.logits - expected.logits).max() < 0.01 * expected.logits.std()
    assert actual.tokens == expected.tokens


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
