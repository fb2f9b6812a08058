"""What llama-cpp-python takes as input or does at the edges, `refreekv_cpp.Llama` does as well."""

from __future__ import annotations

import array
import itertools
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from support import kept, load
from tiny import random_tokens

from refreekv_cpp import Full, ReFreeKV

POLICY = ReFreeKV(n_min=0)
PROMPT = random_tokens(700)

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@dataclass
class Message:
    role: str
    content: str


SYSTEM, QUESTION = "be brief. " * 60, "why?"
DICTS = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
MESSAGES: dict[str, Callable[[], Any]] = {
    "tuple": lambda: tuple(DICTS),
    "deque": lambda: deque(DICTS),
    "iterator": lambda: iter(DICTS),
    "objects": lambda: [Message("system", SYSTEM), Message("user", QUESTION)],
    "deque of objects": lambda: deque([Message("system", SYSTEM), Message("user", QUESTION)]),
    "mappings": lambda: [MappingProxyType(message) for message in DICTS],
    "keys of a dict": lambda: dict(enumerate(DICTS)).values(),
}


def chat(llm: llama_cpp.Llama, messages: Any) -> str:
    response: Any = llm.create_chat_completion(messages, max_tokens=4, temperature=0.0, logit_bias={"100": 50.0})
    return response["choices"][0]["message"]["content"]


@pytest.mark.parametrize("protect", [None, "system"])
@pytest.mark.parametrize("kind", MESSAGES)
def test_messages_of_any_kind(tiny_model: Path, kind: str, protect: Any) -> None:
    # once a TypeError or AttributeError before upstream saw them
    handler = Jinja2ChatFormatter(TEMPLATE, eos_token="</s>", bos_token="<s>").to_chat_handler()
    stock = llama_cpp.Llama(str(tiny_model), n_ctx=2048, n_threads=1, verbose=False, chat_handler=handler)
    llm, other = (load(tiny_model, POLICY, chat_handler=handler, kv_protect=protect) for _ in range(2))
    answer = chat(other, DICTS)
    assert chat(llm, MESSAGES[kind]()) == answer
    assert kept(llm) == kept(other)
    if kind != "iterator":
        assert chat(stock, MESSAGES[kind]()) == answer


TOKENS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "deque": deque,
    "iterator": iter,
    "array": lambda tokens: array.array("i", tokens),
    "int32": lambda tokens: np.array(tokens, dtype=np.int32),
    "int64": lambda tokens: np.array(tokens, dtype=np.int64),
}


@pytest.mark.parametrize("policy", [POLICY, "full", "elastic"], ids=["refreekv", "full", "elastic"])
@pytest.mark.parametrize("kind", TOKENS)
def test_tokens_of_any_kind(tiny_model: Path, kind: str, policy: Any) -> None:
    # once a deque was a TypeError on a pruned cache
    options: dict[str, Any] = {"policy": Full(), "kv_elastic": True} if policy == "elastic" else {"policy": policy}
    llm, other = (load(tiny_model, **options) for _ in range(2))
    for n in (300, 500, 700):

        def generate(tokens: Any, llm: Any) -> list[int]:
            generator = llm.generate(tokens, temp=0.0)
            res = list(itertools.islice(generator, 3))
            generator.close()
            return res

        assert generate(TOKENS[kind](PROMPT[:n]), llm) == generate(PROMPT[:n], other)
    if kind in ("tuple", "array", "int32", "int64"):  # upstream's eval takes slices
        llm.reset()
        llm.eval(TOKENS[kind](PROMPT))
        assert llm._input_ids.tolist() == PROMPT


@pytest.mark.parametrize("policy", [POLICY, "full"], ids=["refreekv", "full"])
@pytest.mark.parametrize("logits_all", [False, True])
@pytest.mark.parametrize("n_ctx", [300, 512, 700])
def test_the_end_of_a_context_of_any_size(tiny_model: Path, n_ctx: int, logits_all: bool, policy: Any) -> None:
    # llama.cpp rounds n_ctx up; where it was no multiple of 256, a NumPy error came first
    llm = load(tiny_model, policy, n_ctx=n_ctx, logits_all=logits_all)
    assert llm.n_ctx() == len(llm.input_ids) >= n_ctx
    prompt = PROMPT[: n_ctx - 20]
    response: Any = llm.create_completion(prompt, max_tokens=-1, temperature=0.0, logit_bias={"100": 100.0})
    assert response["choices"][0]["finish_reason"] == "length"
    assert response["usage"]["total_tokens"] == llm.n_ctx()
    assert llm.n_tokens >= llm.n_ctx() - 1
    with pytest.raises(ValueError, match=rf"Requested tokens \(800\) exceed context window of {llm.n_ctx()}$"):
        llm.create_completion(random_tokens(800))


def test_messages_of_the_library_go_to_logging(
    tiny_model: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    handlers = list(logging.getLogger("refreekv_cpp").handlers)  # another test may have run the command line
    with caplog.at_level(logging.INFO, "refreekv_cpp"):
        llm = load(tiny_model, POLICY, n_ctx=1024)
        llm.eval(PROMPT)
        llm.prune_kv()
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("refreekv_cpp", logging.INFO)
    assert record.getMessage().startswith("process ")
    assert "refreekv: " not in capfd.readouterr().err
    assert logging.getLogger("refreekv_cpp").handlers == handlers


@pytest.mark.parametrize("level", [logging.NOTSET, logging.INFO], ids=["not set up", "set up"])
def test_verbose_shows_each_message_once(
    tiny_model: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], level: int
) -> None:
    llm = load(tiny_model, POLICY, n_ctx=1024, verbose=True)
    llm.eval(PROMPT)
    capfd.readouterr()
    if level:
        caplog.set_level(level, "refreekv_cpp")
    llm.prune_kv()
    printed = capfd.readouterr().err.count("refreekv: process ")
    assert (printed, len(caplog.records)) == ((0, 1) if level else (1, 0))
