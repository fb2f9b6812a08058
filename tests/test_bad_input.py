"""What a user can get wrong is an exception. Each of these once ended or hung the process, or was accepted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from support import load
from tiny import random_tokens

from refreekv_cpp import CacheStateError, ClosedError, Llama
from refreekv_cpp._grammar import MAX_ALTERNATIVES, MAX_OPTIONAL

PROMPT = random_tokens(100)

OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"n_batch": -1}, "n_batch=-1: must be a whole number from 1"),
    ({"n_batch": 0}, "n_batch=0: must be"),
    ({"n_batch": 2**32}, "n_batch=4294967296: must be"),
    ({"n_ubatch": -1}, "n_ubatch=-1: must be"),
    ({"n_ctx": True}, "n_ctx=True: must be"),
    ({"n_ctx": 2**32}, "n_ctx=4294967296: must be"),
    ({"n_threads": 100_000}, "n_threads=100000: must be a whole number from -1 to 512, or None"),
    ({"n_threads_batch": -2}, "n_threads_batch=-2: must be"),
    ({"rope_scaling_type": 9}, "rope_scaling_type=9: must be"),
    ({"pooling_type": 9}, "pooling_type=9: must be"),
    ({"rope_freq_base": "x"}, "rope_freq_base='x': must be a number"),
    ({"last_n_tokens_size": 2**31}, "last_n_tokens_size=2147483648: must be"),
    ({"lora_path": 5}, "lora_path=5: must be a path"),
    ({"kv_overrides": 5}, "kv_overrides=5: must be a dict"),
    ({"kv_overrides": {"llama.block_count": 1000}}, "llama.block_count must be left as it is"),
    ({"kv_overrides": {"a": None}}, "a=None must be a bool, a number or text"),
    ({"kv_overrides": {"a" * 128: 1}}, "must be text of 1 to 127 bytes"),
    ({"kv_elastic": "x"}, "kv_elastic='x': must be one of None, True, False"),
    ({"kv_cold_dir": ""}, "kv_cold_dir='': must be a path"),
    ({"kv_cold_dir": 5}, "kv_cold_dir=5: must be a path"),
    ({"kv_memory_limit": 0}, "kv_memory_limit=0: must be a positive number of bytes"),
    ({"kv_cold_limit": 0}, "kv_cold_limit=0: must be a positive number of bytes"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=str)
def test_an_option_that_is_not_valid(tiny_model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Llama(str(tiny_model), verbose=False, **{"kv_policy": "refreekv", **options})


def test_options_that_stock_takes(tiny_model: Path) -> None:
    llm = load(tiny_model, "full", n_threads=None, n_gpu_layers=-1, n_ubatch=0, kv_overrides={"general.name": "x"})
    assert llm.create_completion(PROMPT, max_tokens=1)
    assert load(tiny_model, "full", n_ctx=np.int64(256), n_batch=np.int32(64)).n_batch == 64
    assert load(tiny_model, "full", n_ctx=256, n_batch=2**31 - 1).n_batch == 256


def test_a_path_object_and_what_is_none(tiny_model: Path) -> None:
    assert Llama(tiny_model, kv_policy="full", verbose=False).n_ctx()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model_path=5: must be a path"):
        Llama(5, kv_policy="full", verbose=False)  # type: ignore[arg-type]


def test_a_model_is_no_adapter(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="must be a LoRA adapter for this model"):
        Llama(str(tiny_model), kv_policy="full", verbose=False, lora_path=str(tiny_model))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"root ::= {' '.join(['a'] * (MAX_OPTIONAL + 1))}\n" + 'a ::= "x"?', "optional parts in a row"),
        (f"root ::= {' '.join(['a?'] * (MAX_OPTIONAL + 1))}\n" + 'a ::= "x"', "optional parts in a row"),
        ("root ::= a0\n" + "".join(f'a{i} ::= a{i + 1} "y" | a{i + 1} "z"\n' for i in range(40)) + 'a40 ::= "x"',
         "alternatives at one place"),
        ("root ::= " + " | ".join(f'"{i}"' for i in range(MAX_ALTERNATIVES + 1)), "alternatives at one place"),
    ],
    ids=["rules", "optional", "doubling", "alternatives"],
)  # fmt: skip
def test_a_grammar_with_too_many_branches(tiny_model: Path, text: str, message: str) -> None:
    llm = load(tiny_model, "full")
    with pytest.raises(ValueError, match=message):
        llm.create_completion("a", grammar=llama_cpp.LlamaGrammar.from_string(text, verbose=False))


@pytest.mark.parametrize("sign", ["[", '"\\', "<", "a{", "("])
def test_a_grammar_of_one_open_sign_is_refused_at_once(tiny_model: Path, sign: str) -> None:
    llm = load(tiny_model, "full")
    grammar = llama_cpp.LlamaGrammar(_grammar="root ::= " + sign * 40_000)
    with pytest.raises(ValueError, match="the grammar"):
        llm.create_completion("abc", max_tokens=1, grammar=grammar)


def test_a_schema_with_many_optional_properties_is_taken(tiny_model: Path) -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {f"property{i}": {"type": "string"} for i in range(99)}}
    schema["properties"]["one of many"] = {"enum": [*map(str, range(500))]}
    answer: Any = load(tiny_model, "full").create_chat_completion(
        [{"role": "user", "content": "a"}], response_format={"type": "json_object", "schema": schema}, max_tokens=2
    )
    assert answer["choices"][0]["message"]["content"].startswith("{")


@pytest.mark.parametrize("texts", [[], ["a", ""], ""], ids=str)
def test_nothing_to_embed(tiny_model: Path, texts: Any) -> None:
    llm = load(tiny_model, "full", embedding=True)
    llm.tokenizer_.tokenize = lambda text, *_: list(text)  # type: ignore[method-assign]  # one that adds no token
    for embed in (llm.embed, llm.create_embedding):
        with pytest.raises(ValueError, match="with one token at least"):
            embed(texts)
    assert len(llm.embed(["a", "bc"])) == 2


@pytest.mark.parametrize("policy", ["refreekv", "full"])
def test_sampling_what_has_no_logits(tiny_model: Path, policy: str) -> None:
    llm = load(tiny_model, policy)
    with pytest.raises(CacheStateError, match="no logits to sample from"):
        llm.sample()
    generator = llm.generate(PROMPT)
    next(generator)
    with pytest.raises(ValueError, match="logits_all=True"):
        generator.send([1, 2])
    generator = load(tiny_model, policy, logits_all=True).generate(PROMPT)
    next(generator)
    assert isinstance(generator.send([1, 2]), int)


def test_an_empty_state(tiny_model: Path) -> None:
    llm = load(tiny_model, "refreekv")
    llm.eval(PROMPT)
    state = llm.save_state()
    state.llama_state, state.llama_state_size = b"", 0
    with pytest.raises(CacheStateError, match="it is empty"):
        llm.load_state(state)


@pytest.mark.parametrize("policy", ["refreekv", "full"])
def test_closing_while_another_thread_generates(tiny_model: Path, policy: str) -> None:
    llm = load(tiny_model, policy)
    begun, raised = threading.Event(), []

    def generate() -> None:
        try:
            for _ in llm.generate(PROMPT):
                begun.set()
        except ClosedError as error:
            raised.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    begun.wait(60)
    llm.close()
    thread.join(60)
    assert raised


def test_two_threads_complete_one_after_the_other(tiny_model: Path) -> None:
    llm = load(tiny_model, "refreekv")
    prompts = [random_tokens(200, seed=i) for i in range(4)]
    expected = [llm.create_completion(prompt, max_tokens=8, temperature=0)["choices"][0]["text"] for prompt in prompts]
    got: dict[int, str] = {}

    def complete(i: int) -> None:
        got[i] = llm.create_completion(prompts[i], max_tokens=8, temperature=0)["choices"][0]["text"]

    threads = [threading.Thread(target=complete, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [got[i] for i in range(4)] == expected


def test_a_generation_that_another_one_has_replaced(tiny_model: Path) -> None:
    llm = load(tiny_model, "refreekv")
    first, second = llm.generate(PROMPT), llm.generate(PROMPT[:50])
    next(first)
    next(second)
    with pytest.raises(CacheStateError, match="this generation cannot go on"):
        next(first)
    next(second)


@pytest.mark.parametrize("change", ["reset", "load_state"])
def test_a_generation_whose_cache_was_changed(tiny_model: Path, change: str) -> None:
    llm = load(tiny_model, "refreekv")
    generation = llm.generate(PROMPT)
    next(generation)
    state = llm.save_state()
    next(generation)
    llm.reset() if change == "reset" else llm.load_state(state)
    with pytest.raises(CacheStateError, match="this generation cannot go on"):
        next(generation)
    next(llm.generate(PROMPT))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("use", ["llm.eval([1])", "llm.create_completion('a')", "llm.kv_stats", "llm.tokenize(b'a')"])
def test_a_forked_process_says_so_and_ends(tiny_model: Path, use: str) -> None:
    script = f"""
import os, sys
from refreekv_cpp import ClosedError, Llama
llm = Llama(sys.argv[1], kv_policy="refreekv", n_threads=2, n_threads_batch=2, verbose=False)
llm.create_completion("abc", max_tokens=2)
if os.fork() == 0:
    try:
        {use}
    except ClosedError as error:
        llm.close()
        del llm
        sys.exit(0 if "before os.fork()" in str(error) else 1)
    sys.exit(2)
assert os.wait()[1] == 0
llm.create_completion("abc", max_tokens=2)
"""
    subprocess.run([sys.executable, "-c", script, str(tiny_model)], check=True, timeout=60)
