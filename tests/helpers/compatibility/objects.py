"""The `Llama` object itself: how it is made, copied, used side by side, and closed."""

from __future__ import annotations

import pickle
import sys
import threading
from contextlib import closing, redirect_stderr
from io import StringIO
from types import ModuleType
from typing import Any
from unittest import mock

import llama_cpp
import numpy as np
import pytest
from support import feed
from tiny import random_tokens

from compatibility.check import POLICIES, PROMPT, Run, check
from refreekv_cpp import ClosedError, Full, Llama


@check("import llama_cpp after refreekv_cpp", prunes=False)
def same_module(run: Run) -> None:
    llm = run.load()
    assert isinstance(llm, llama_cpp.Llama)
    assert llm.n_ctx() == 2048


@check("tokenize, detokenize, vocab_only", prunes=False)
def tokenizer(run: Run) -> None:
    text = "Ships: 12 — ökonomisch ☺".encode()
    for llm in (run.load(), run.load(vocab_only=True)):
        tokens = llm.tokenize(text)
        assert tokens[0] == llm.token_bos() == 1
        assert llm.detokenize(tokens).decode().replace("▁", " ").strip() == text.decode()
        assert llm.tokenizer().encode("ab") == llm.tokenize(b"ab", add_bos=True, special=True)
        assert (llm.n_vocab(), llm.token_eos()) == (259, 2)


@check("embed, create_embedding (embedding=True)", prunes=False)
def embedding(run: Run) -> str:
    by_token = run.load(embedding=True)
    assert by_token.kv_policy == Full()
    assert np.array(by_token.embed("Ships")).shape == (1 + 3 + 5, 64)  # BOS, the three bytes of a space, the word

    mean = run.load(embedding=True, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN)
    first, second, third = np.array(mean.embed(["Ships", "Harbours", "Ships"]))
    np.testing.assert_allclose(first, third, atol=1e-4)
    np.testing.assert_allclose(first, np.mean(by_token.embed("Ships"), axis=0), atol=1e-3)
    assert np.abs(first - second).max() > 1e-2
    answer = mean.create_embedding("Ships")
    np.testing.assert_allclose(answer["data"][0]["embedding"], first, atol=1e-4)

    said = StringIO()
    with mock.patch("llama_cpp.llama.suppress_stdout_stderr"), redirect_stderr(said):
        llama = Llama(str(run.model("gqa")), kv_policy=run.policy, embedding=True, verbose=True, n_ctx=256)
        llama.close()
    lines = said.getvalue().splitlines()
    return "".join(line.removeprefix("refreekv: ") for line in lines if line.startswith("refreekv: "))


@check("Llama.from_pretrained")
def from_pretrained(run: Run) -> None:
    path = run.model("gqa")
    hub, utils = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.utils")
    asked: list[dict[str, Any]] = []

    class HfFileSystem:
        def ls(self, repo_id: str, recursive: bool) -> list[dict[str, str]]:
            return [{"name": f"{repo_id}/{path.name}"}, {"name": f"{repo_id}/README.md"}]

    def hf_hub_download(**options: Any) -> str:
        asked.append(options)
        return str(path)

    hub.__dict__.update(HfFileSystem=HfFileSystem, hf_hub_download=hf_hub_download)
    utils.__dict__.update(validate_repo_id=lambda repo_id: None)
    with mock.patch.dict(sys.modules, {"huggingface_hub": hub, "huggingface_hub.utils": utils}):
        llm = Llama.from_pretrained("someone/tiny", "*.gguf", kv_policy=run.policy, n_ctx=1024, verbose=False)
    assert type(llm) is Llama
    assert llm.kv_policy == run.policy
    assert {options["filename"] for options in asked} == {path.name}
    llm.eval(PROMPT)
    run.n_evicted += llm.prune_kv()


@check("pickle, __getstate__")
def pickled(run: Run) -> None:
    llm = run.load(n_batch=64, seed=7, kv_evicted="drop")
    state = llm.__getstate__()
    assert (state["n_batch"], state["seed"], state["n_ctx"]) == (64, 7, 2048)
    again = pickle.loads(pickle.dumps(llm))
    again.run = run
    assert again.__getstate__() == state
    assert run.by_hand(again, PROMPT) == run.by_hand(llm, PROMPT)


@check("reset")
def reset(run: Run) -> None:
    llm = run.load()
    run.by_hand(llm, random_tokens(700, seed=3))
    llm.reset()
    assert llm.n_tokens == 0
    assert run.by_hand(llm, PROMPT) == run.by_hand(run.load(), PROMPT)


@check("close, contextlib.closing")
def close(run: Run) -> None:
    with closing(run.load()) as llm:
        run.by_hand(llm, PROMPT)
    with pytest.raises(ClosedError):  # upstream's would end the process
        llm.eval(PROMPT)
    llm.close()  # once more


@check("eval, sample, generate, scores, n_tokens")
def low_level(run: Run) -> None:
    llm = run.load(logits_all=True)
    llm.eval(PROMPT[:300])
    llm.eval(PROMPT[300:])
    assert llm.n_tokens == len(PROMPT)
    assert llm.sample(temp=0.0) == int(np.argmax(llm.scores[llm.n_tokens - 1]))
    assert list(llm.eval_tokens) == PROMPT
    assert llm.input_ids[: llm.n_tokens].tolist() == PROMPT
    llm.prune_kv()
    first = feed(llm, PROMPT[1:9])
    llm.n_tokens = len(PROMPT)  # back behind the prompt
    np.testing.assert_array_equal(feed(llm, PROMPT[1:9]), first)


@check("two policies in one process")
def two_policies(run: Run) -> None:
    expected = {name: run.by_hand(run.load(policy=policy), PROMPT) for name, policy in POLICIES.items()}
    llms = {name: run.load(policy=policy) for name, policy in POLICIES.items()}
    answers: dict[str, list[int]] = {name: [] for name in llms}
    for name, llm in llms.items():
        assert run.by_hand(llm, PROMPT, 3) == expected[name][:3]
        assert llm.kv_policy == POLICIES[name]
    for _ in range(3, 8):  # and now in turn
        for name, llm in llms.items():
            answers[name].append(llm.sample())
            llm.eval([answers[name][-1]])
    assert {name: expected[name][:3] + answer for name, answer in answers.items()} == expected
    assert min(llms["full"].kv_stats.cells_kept) == len(PROMPT) + 8 > min(llms["refreekv"].kv_stats.cells_kept)


@check("threads, a Llama each")
def threads(run: Run) -> None:
    prompts = [random_tokens(700, seed=seed) for seed in range(3)]
    expected = [run.by_hand(run.load(), prompt) for prompt in prompts]
    answers: dict[int, list[int]] = {}
    loading = threading.Lock()  # llama-cpp-python redirects stdout while it loads

    def work(i: int) -> None:
        with loading:
            llm = run.load()
        answers[i] = run.by_hand(llm, prompts[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [answers[i] for i in range(3)] == expected
