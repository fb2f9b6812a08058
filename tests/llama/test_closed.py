"""A `Llama` that is closed, or could not be loaded: whatever needs the model says so, where it once crashed."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from support import Q8_0, load
from tiny import random_tokens

from refreekv_cpp import ClosedError, Llama, RefreeKVError

PROMPT = random_tokens(300)

USES: dict[str, Callable[[Llama], Any]] = {
    "kv_stats": lambda llm: llm.kv_stats,
    "prune_kv": lambda llm: llm.prune_kv(),
    "eval": lambda llm: llm.eval(PROMPT),
    "sample": lambda llm: llm.sample(),
    "generate": lambda llm: next(llm.generate(PROMPT)),
    "create_completion": lambda llm: llm.create_completion(PROMPT, max_tokens=1),
    "create_completion of text": lambda llm: llm("a", max_tokens=1),
    "a stream": lambda llm: next(iter(llm.create_completion(PROMPT, stream=True))),
    "create_chat_completion": lambda llm: llm.create_chat_completion([{"role": "user", "content": "a"}]),
    "embed": lambda llm: llm.embed("a"),
    "create_embedding": lambda llm: llm.create_embedding("a"),
    "save_state": lambda llm: llm.save_state(),
    "tokenize": lambda llm: llm.tokenize(b"a"),
    "detokenize": lambda llm: llm.detokenize([65]),
    "tokenizer": lambda llm: llm.tokenizer().encode("a"),
    "ctx": lambda llm: llm.ctx,
    "model": lambda llm: llm.model,
    "n_ctx": lambda llm: llm.n_ctx(),
    "n_embd": lambda llm: llm.n_embd(),
    "n_vocab": lambda llm: llm.n_vocab(),
    "token_eos": lambda llm: llm.token_eos(),
    "token_bos": lambda llm: llm.token_bos(),
    "token_nl": lambda llm: llm.token_nl(),
    "pooling_type": lambda llm: llm.pooling_type(),
}


@pytest.mark.parametrize("policy", ["refreekv", "full"])
@pytest.mark.parametrize("use", USES)
def test_a_closed_llama_says_so(tiny_model: Path, use: str, policy: str) -> None:
    llm = load(tiny_model, policy)
    llm.eval(PROMPT)
    llm.close()
    llm.close()
    with pytest.raises(ClosedError, match="is closed"):
        USES[use](llm)


@pytest.mark.parametrize("policy", ["refreekv", "full"])
def test_what_was_begun_before(tiny_model: Path, policy: str) -> None:
    llm = load(tiny_model, policy)
    tokenizer, generator, state = llm.tokenizer(), llm.generate(PROMPT), llm.save_state()
    next(generator)
    llm.close()
    with pytest.raises(ClosedError):
        next(generator)
    generator.close()
    with pytest.raises(ClosedError):
        tokenizer.encode("a")
    with pytest.raises(ClosedError):
        llm.load_state(state)


# what takes no lock of the Llama
UNLOCKED = ["ctx", "model", "n_ctx", "n_embd", "n_vocab", "token_eos", "token_bos", "token_nl", "pooling_type"]


@pytest.mark.parametrize("use", UNLOCKED)
def test_one_that_another_thread_is_closing_says_so(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    # once it read memory that was being freed
    llm = load(tiny_model, "refreekv")
    frees, go_on = threading.Event(), threading.Event()
    free = llama_cpp.llama_model_free
    monkeypatch.setattr(
        llama_cpp.llama_cpp, "llama_model_free", lambda model: (frees.set(), go_on.wait(60), free(model))
    )
    closing = threading.Thread(target=llm.close)
    closing.start()
    try:
        assert frees.wait(60)
        with pytest.raises(ClosedError, match="is closed"):
            USES[use](llm)
    finally:
        go_on.set()
        closing.join(60)


def test_closing_waits_for_a_grammar_that_is_being_checked(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # once llama.cpp could look up a grammar's tokens in a vocabulary that had been freed
    llm = load(tiny_model, "refreekv")
    closing, make, closed = threading.Thread(target=llm.close), llama_cpp.llama_sampler_init_grammar, []

    def meanwhile(*args: Any) -> Any:
        if not closed:
            closing.start()
            closing.join(0.3)
            closed.append(not closing.is_alive())
        return make(*args)

    monkeypatch.setattr(llama_cpp, "llama_sampler_init_grammar", meanwhile)
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "a"')
    with pytest.raises(ClosedError):
        llm.create_completion(PROMPT, grammar=grammar)
    closing.join(60)
    assert closed == [False]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "options",
    [{"kv_policy": "no such"}, {"model_path": "no such"}, {"type_v": Q8_0, "flash_attn": False}],
    ids=["option", "file", "type"],
)
def test_a_llama_that_could_not_be_loaded_says_so(tiny_model: Path, use: str, options: dict[str, Any]) -> None:
    llm = Llama.__new__(Llama)
    with pytest.raises((ValueError, RefreeKVError), match=r"."):
        llm.__init__(**{"model_path": str(tiny_model), "verbose": False, **options})  # type: ignore[misc]
    with pytest.raises(ClosedError, match="could not be loaded"):
        USES[use](llm)
    llm.close()


def test_a_closed_llama_can_still_be_pickled_and_asked_for_what_it_lacks(tiny_model: Path) -> None:
    llm = load(tiny_model, "refreekv")
    with pytest.raises(AttributeError, match="no attribute 'n_tokns'"):
        _ = llm.n_tokns
    assert not hasattr(llm, "n_tokns")
    state = pickle.dumps(llm)
    llm.close()
    assert pickle.loads(state).n_ctx() == 2048
    assert issubclass(ClosedError, RefreeKVError)


def test_closing_frees_the_model_once(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    freed = []
    free = llama_cpp.llama_model_free
    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_free", lambda model: (freed.append(1), free(model)))
    llm = load(tiny_model, "refreekv")
    for _ in range(3):
        llm.close()
    del llm
    assert freed == [1]
