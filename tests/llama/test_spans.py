"""Protected positions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from policies import POLICIES
from support import Sequences, ctx_of, kept, load
from tiny import random_tokens

from refreekv_cpp import CacheStateError, Llama, PolicyError, ReFreeKV, Streaming, native, spans

Tiny = Callable[[str], Path]

PROMPT = random_tokens(700)
SPANS = [(40, 90), (300, 301)]
PROTECTED = {*range(40, 90), 300}
POLICY = ReFreeKV(threshold=0.5, n_min=0)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "full"])
def test_no_policy_evicts_what_is_protected(tiny_model: Path, name: str) -> None:
    free, llm = load(tiny_model, POLICIES[name]), load(tiny_model, POLICIES[name], kv_protect=SPANS)
    for each in (free, llm):
        each.eval(PROMPT)
        assert each.prune_kv() > 0
    assert not all(set(layer) >= PROTECTED for layer in kept(free))
    assert all(set(layer) >= PROTECTED for layer in kept(llm))


def test_they_stay_protected_in_later_turns_and_not_in_another_conversation(tiny_model: Path) -> None:
    llm = load(tiny_model, POLICY)
    llm.eval(PROMPT)
    native.protect(ctx_of(llm), 0, 40, 90)
    llm.prune_kv()
    llm.eval(random_tokens(300, seed=3))
    llm.prune_kv()
    assert all(set(layer) >= set(range(40, 90)) for layer in kept(llm))
    llm.reset()
    llm.eval(PROMPT)
    llm.prune_kv()
    assert not all(set(layer) >= set(range(40, 90)) for layer in kept(llm))


def test_a_conversation_that_parts_early_forgets_what_lay_behind(tiny_model: Path) -> None:
    llm = load(tiny_model, POLICY)
    llm.eval(PROMPT)
    native.protect(ctx_of(llm), 0, 3, 600)
    llm.n_tokens = 20
    llm.eval(random_tokens(680, seed=4))
    llm.prune_kv()
    assert all(set(layer) >= set(range(3, 20)) for layer in kept(llm))
    assert not all(set(layer) >= set(range(20, 600)) for layer in kept(llm))


def test_a_copy_keeps_what_was_named_before(tiny_model: Path) -> None:
    sequences = Sequences(tiny_model, POLICY)
    native.protect(sequences.ctx, 1, 100, 400)
    sequences.read(0, PROMPT)
    sequences.copy(0, 1)
    sequences.remove(0)
    sequences.read(1, [5])
    native.prune(sequences.ctx, 1)
    assert all(set(layer) >= set(range(100, 400)) for layer in sequences.kept(1))


def test_a_copy_is_protected_too(tiny_model: Path) -> None:
    sequences = Sequences(tiny_model, POLICY)
    sequences.read(0, PROMPT)
    native.protect(sequences.ctx, 0, 40, 90)
    sequences.copy(0, 1)
    sequences.remove(0)
    sequences.read(1, [5])
    native.prune(sequences.ctx, 1)
    assert all(set(layer) >= set(range(40, 90)) for layer in sequences.kept(1))


def test_what_a_copy_replaces_is_not_protected_any_more(tiny_model: Path) -> None:
    sequences = Sequences(tiny_model, POLICY, kv_unified=False)
    for seq_id in (0, 1):
        sequences.read(seq_id, PROMPT)
    native.protect(sequences.ctx, 1, 3, 600)
    sequences.copy(0, 1)
    sequences.read(1, [5])
    native.prune(sequences.ctx, 1)
    assert not all(set(layer) >= set(range(3, 600)) for layer in sequences.kept(1))


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}"


def chat(llm: Llama, system: Any) -> None:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    llm.chat_handler = Jinja2ChatFormatter(TEMPLATE, eos_token="", bos_token="").to_chat_handler()
    text = " ".join(f"word{i}" for i in range(120))
    llm.create_chat_completion(
        [{"role": "system", "content": system}, {"role": "user", "content": text}], max_tokens=2, temperature=0.0
    )


def test_the_system_message(tiny_model: Path) -> None:
    system = f"  Always-answer-like-a-pirate!{'Arr!' * 30} "  # no spaces inside: this vocabulary has none
    llm = load(tiny_model, Streaming(budget=0.3, n_min=0), kv_protect="system")
    chat(llm, system)
    assert llm.kv_stats.budget < 1
    pieces = [spans._piece(llm, token) for token in llm._input_ids.tolist()]
    start, end = spans.find_text(llm, system.strip()) or (0, 0)
    assert b"".join(pieces[start:end]) == system.strip().encode()
    assert all(set(layer) >= set(range(start, end)) for layer in kept(llm))

    free = load(tiny_model, Streaming(budget=0.3, n_min=0))
    chat(free, system)
    assert not any(set(layer) >= set(range(start, end)) for layer in kept(free))


@pytest.mark.parametrize("memory_limit", [None, "400KiB"])
def test_chats_that_are_streamed_at_once_have_a_system_message_each(tiny_model: Path, memory_limit: str | None) -> None:
    # once the message of the chat that was begun last was looked for, and the first one's was evicted
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    handler = Jinja2ChatFormatter(TEMPLATE, eos_token="</s>", bos_token="").to_chat_handler()
    policy = Streaming(budget=0.3, n_min=0)
    llm = load(tiny_model, policy, kv_protect="system", kv_memory_limit=memory_limit, n_batch=128, chat_handler=handler)
    text = " ".join(f"word{i}" for i in range(110))
    systems = [f"Always-answer-like-a-{kind}!{'Arr!' * 20}" for kind in ("pirate", "poet")]
    chats: list[Any] = [
        llm.create_chat_completion(
            [{"role": "system", "content": system}, {"role": "user", "content": text}],
            max_tokens=8,
            stream=True,
            logit_bias={"100": 50.0},
        )
        for system in systems
    ]
    for system, chunks in zip(systems, chats, strict=True):
        for _ in range(4):
            next(chunks)
        assert llm.kv_stats.budget < 1
        start, end = spans.find_text(llm, system) or (0, 0)
        assert end > start
        assert all(set(layer) >= set(range(start, end)) for layer in kept(llm))
    with pytest.raises(CacheStateError, match="this generation cannot go on"):
        next(chats[0])


def test_a_prompt_that_is_no_chat_has_no_system_message(tiny_model: Path) -> None:
    llm = load(tiny_model, Streaming(budget=0.3, n_min=0), kv_protect="system")
    system = f"Always-answer-like-a-pirate!{'Arr!' * 30}"
    chat(llm, system)
    start, end = spans.find_text(llm, system) or (0, 0)
    assert all(set(layer) >= set(range(start, end)) for layer in kept(llm))
    prompt = llm._input_ids.tolist()
    llm.reset()
    llm.create_completion(prompt, max_tokens=2)
    assert not all(set(layer) >= set(range(start, end)) for layer in kept(llm))


def test_no_system_message_is_no_error(tiny_model: Path) -> None:
    llm = load(tiny_model, POLICY, kv_protect="system")
    assert spans.system_text([{"role": "user", "content": "x"}]) is None
    assert spans.system_text([{"role": "system", "content": [{"type": "text", "text": "a part"}]}]) == "a part"
    llm.create_completion("hello", max_tokens=1)


@pytest.mark.parametrize("protect", ["user", [(0, float("inf"))], [(3, 2)], [(-1, 4)], [5], 7, [("a", "b")]])
def test_what_is_no_span_is_refused_before_any_work(protect: Any) -> None:
    with pytest.raises(PolicyError, match=r"kv_protect=.*must be"):
        Llama("no such model", kv_policy="refreekv", kv_protect=protect)
