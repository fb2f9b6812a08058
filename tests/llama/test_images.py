"""Images: a prompt that llama-cpp-python's handlers read themselves, in part past `Llama.eval`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compatibility.check import PROMPT, Run
from compatibility.images import LLAVA, QWEN, Answer, Vision, answer, ask
from support import ctx_of, feed, kept
from tiny import random_tokens
from tiny_projector import random_png

from refreekv_cpp import CacheMemoryError, Policy, PolicyError, PythonPolicy, ReFreeKV, native

POLICY = ReFreeKV(n_min=0)
MESSAGES = ask(random_png(160, 96))

Load = Callable[..., Any]


@pytest.fixture(params=[LLAVA, QWEN], ids=["llava", "m-rope"])
def vision(request: pytest.FixtureRequest) -> Vision:
    model: Vision = request.param
    return model


@pytest.fixture
def load(tiny: Callable[[str], Path], tmp_path: Path, vision: Vision) -> Iterator[Load]:
    llms: list[Any] = []

    def load(policy: Policy = POLICY, **options: Any) -> Any:
        llms.append(vision.load(Run(policy, tiny, tmp_path), **options))
        return llms[-1]

    yield load
    for llm in llms:
        llm.close()


def assert_same(actual: Answer, expected: Answer) -> None:
    assert (actual.text, actual.usage) == (expected.text, expected.usage)
    np.testing.assert_array_equal(actual.logits, expected.logits)


def test_the_prompt_is_pruned_once_and_as_a_whole(load: Load) -> None:
    llm = load()
    prunes = []
    llm.prune_kv = lambda prune=llm.prune_kv: prunes.append((llm.n_tokens, prune()))
    n_prompt = answer(llm, MESSAGES).usage["prompt_tokens"]
    assert [n_tokens for n_tokens, _ in prunes] == [n_prompt]
    stats = llm.kv_stats
    assert stats.n_prunes == 1
    assert prunes[0][1] == 4 * stats.n_tokens - sum(map(len, kept(llm)))


def test_every_chat_is_read_anew(load: Load) -> None:
    llm, expected = load(), answer(load(), MESSAGES)
    other = answer(llm, ask(random_png(160, 96, seed=1)))
    assert np.abs(other.logits - expected.logits).max() > 0
    assert_same(answer(llm, MESSAGES), expected)


def test_a_state_that_was_loaded_before_changes_nothing(load: Load) -> None:
    """After one the end of a prompt is read again, for its queries. An image cannot be: it is no tokens."""
    llm, expected = load(), answer(load(), MESSAGES)
    llm.eval(PROMPT)
    llm.load_state(llm.save_state())
    assert_same(answer(llm, MESSAGES), expected)


def test_a_state_holds_images(load: Load) -> None:
    llm, other = load(), load()
    answer(llm, MESSAGES)
    other.load_state(llm.save_state())
    assert kept(other) == kept(llm)
    more = random_tokens(30, seed=1)[1:]
    np.testing.assert_array_equal(feed(other, more), feed(llm, more))


class EveryThird(PythonPolicy):
    def select(self, attention: Any, positions: Any, layer: int) -> Any:
        mask = np.arange(len(positions)) % 3 == 0
        mask[-32:] = True
        return mask


def test_a_policy_in_python_evicts_from_prompts_with_images(load: Load, vision: Vision) -> None:
    llm = load(EveryThird(n_min=0))
    answer(llm, MESSAGES)
    n_image = np.unique(kept(llm)[0], return_counts=True)[1].max()
    # with M-RoPE all of an image has one position, and stays when any of it does
    assert n_image == (240 if vision is QWEN else 1)
    assert 0 < len(kept(llm)[0]) < llm.kv_stats.n_tokens


def test_an_image_that_passes_the_limit_is_refused(load: Load) -> None:
    messages = ask(random_png(256, 192))
    expected = answer(load(), messages)
    row = load().kv_stats.bytes_per_token
    llm = load(kv_memory_limit=1024 * row)  # the text before the image fits
    with pytest.raises(CacheMemoryError, match=f"the limit is {1024 * row}"):
        answer(llm, messages)
    assert 0 < llm.kv_stats.bytes <= 1024 * row
    assert_same(answer(load(kv_memory_limit=2048 * row), messages), expected)


def test_another_error_of_a_handler_stays_what_it_is(load: Load) -> None:
    llm = load()

    def handler(**_: Any) -> None:
        with suppress(PolicyError):
            native.keep(ctx_of(llm), 0, 99, np.arange(1))
        raise ValueError("no image")

    llm.chat_handler = handler
    with pytest.raises(ValueError, match="no image"):
        answer(llm, MESSAGES)
