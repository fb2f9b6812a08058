"""Several threads, processes and event loops use a `Llama`, or one each."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from books import reader
from support import load
from tiny import N_SPECIAL, N_VOCAB, random_tokens

from refreekv_cpp import CacheStateError, ClosedError, Llama, ReFreeKV

N_THREADS = 4
# no end of the text, and no unfinished characters, whose tokens llama-cpp-python does not count
ASCII: Any = {str(token): -1000.0 for token in (2, *range(N_SPECIAL + 128, N_VOCAB))}
PROMPTS = [random_tokens(600 + 10 * i, seed=i) for i in range(N_THREADS)]
OPTIONS = 'kv_policy="refreekv", n_ctx=2048, n_threads=2, n_threads_batch=2, verbose=False'


def answer(llm: Llama, prompt: list[int]) -> str:
    """The text of a greedy completion, a character for each token."""
    completion: Any = llm.create_completion(prompt, max_tokens=5, temperature=0.0, logit_bias=ASCII)
    return completion["choices"][0]["text"]


def expected(model: Path, **options: Any) -> list[str]:
    llm = load(model, ReFreeKV(), codes=True, **options)
    return [answer(llm, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("policy", [ReFreeKV(), "full"], ids=["refreekv", "full"])
def test_each_thread_has_its_own(tiny_model: Path, policy: Any) -> None:
    def work(i: int) -> list[str]:
        llm = load(tiny_model, policy, codes=True, n_threads=2, n_threads_batch=2)
        try:
            return [answer(llm, prompt) for prompt in PROMPTS[i:] + PROMPTS[:i]]
        finally:
            llm.close()

    with ThreadPoolExecutor(N_THREADS) as threads:
        found = list(threads.map(work, range(N_THREADS)))
    for i in range(N_THREADS):
        assert found[i][N_THREADS - i :] + found[i][: N_THREADS - i] == found[0]


def test_threads_with_one_library(tiny_model: Path, tmp_path: Path) -> None:
    def work(i: int) -> list[str]:
        llm = reader(tiny_model, tmp_path, kv_evicted="restore")
        return [answer(llm, prompt) for prompt in [*PROMPTS[i:], *PROMPTS[:i]] * 2]

    with ThreadPoolExecutor(N_THREADS) as threads:
        found = list(threads.map(work, range(N_THREADS)))
    without = expected(tiny_model, kv_evicted="restore", n_batch=256)
    for i in range(N_THREADS):
        assert found[i] == [*without[i:], *without[:i]] * 2
    assert not list(tmp_path.glob(".*"))


def test_everything_at_once(tiny_model: Path, tmp_path: Path) -> None:
    """Several of them share a library with too little room, in which each removes what the others may be opening. Each
    has threads that evict and restore, a file of its own, and a thread that reads its statistics."""

    def work(i: int) -> list[str]:
        llm = reader(
            tiny_model,
            tmp_path / "library",
            n_threads=2,
            n_threads_batch=2,
            kv_evicted="restore",
            kv_cold="file",
            kv_cold_dir=tmp_path,
            kv_library_limit=1 << 20,
        )
        done = threading.Event()
        found = []

        def read() -> None:
            while not done.is_set():
                found.append(llm.kv_stats.n_tokens)

        statistics = threading.Thread(target=read)
        statistics.start()
        try:
            answers = [answer(llm, prompt) for prompt in [*PROMPTS[i:], *PROMPTS[:i]]]
        finally:
            done.set()
            statistics.join()
        assert found
        llm.close()
        return answers

    with ThreadPoolExecutor(N_THREADS) as threads:
        found = list(threads.map(work, range(N_THREADS)))
    without = expected(tiny_model, kv_evicted="restore", n_batch=256)
    for i in range(N_THREADS):
        assert found[i] == [*without[i:], *without[:i]]


@pytest.mark.parametrize("evicted", ["keep", "restore"])
def test_several_threads_use_one(tiny_model: Path, evicted: str) -> None:
    one_by_one = expected(tiny_model, kv_evicted=evicted)
    llm = load(tiny_model, ReFreeKV(), codes=True, kv_evicted=evicted)
    for _ in range(3):
        with ThreadPoolExecutor(N_THREADS) as threads:
            assert list(threads.map(lambda prompt: answer(llm, prompt)[:1], PROMPTS)) == [a[:1] for a in one_by_one]
    assert [answer(llm, prompt) for prompt in PROMPTS] == one_by_one


def test_streams_of_several_threads(tiny_model: Path) -> None:
    """One at a time has the cache; the others end with an error that says so, and the Llama goes on."""
    llm = load(tiny_model, ReFreeKV(), codes=True)
    ended = []

    def work(prompt: list[int]) -> None:
        try:
            for _ in llm.create_completion(prompt, max_tokens=20, temperature=0.0, logit_bias=ASCII, stream=True):
                pass
            ended.append("whole")
        except CacheStateError as error:
            ended.append(str(error))

    threads = [threading.Thread(target=work, args=[prompt]) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(ended) == N_THREADS
    assert "whole" in ended
    assert all(how == "whole" or "cannot go on" in how for how in ended)
    assert answer(llm, PROMPTS[1]) == expected(tiny_model)[1]


def test_a_stream_that_waits_keeps_its_seed(tiny_model: Path) -> None:
    # once its tokens were those of the seed that another completion had meanwhile
    llm = load(tiny_model, ReFreeKV(), codes=True)
    options: Any = {"max_tokens": 12, "temperature": 2.0, "top_p": 1.0, "logit_bias": ASCII, "stream": True, "seed": 1}

    def text(stream: Any) -> str:
        return "".join(chunk["choices"][0]["text"] for chunk in stream)

    prompt = PROMPTS[0][:100]  # nothing of it is evicted
    first = text(llm.create_completion(prompt, **options))
    stream, found = llm.create_completion(prompt, **options), []
    waits, completing = threading.Event(), llm._completing

    class Noted:
        def __enter__(self) -> None:
            waits.set()
            completing.acquire()

        def __exit__(self, *_: object) -> None:
            completing.release()

    thread = threading.Thread(target=lambda: found.append(text(stream)))
    with completing:  # as another thread's completion
        llm._completing = Noted()  # type: ignore[assignment]
        thread.start()
        assert waits.wait(60)
        llm.set_seed(2)
    thread.join(60)
    assert found == [first]


def test_an_event_loop(tiny_model: Path) -> None:
    llm = load(tiny_model, ReFreeKV(), codes=True)

    async def ask(prompt: list[int]) -> str:
        return (await asyncio.to_thread(answer, llm, prompt))[:1]

    async def main() -> list[str]:
        gone = asyncio.create_task(ask(PROMPTS[0]))  # a client that leaves: its thread goes on to the end
        await asyncio.sleep(0)
        gone.cancel()
        return list(await asyncio.gather(*map(ask, PROMPTS)))

    assert asyncio.run(main()) == [each[:1] for each in expected(tiny_model)]


def test_a_process_that_is_spawned_loads_it_anew(tiny_model: Path) -> None:
    llm = load(tiny_model, ReFreeKV(), codes=True)
    first = answer(llm, PROMPTS[0])
    assert answer(pickle.loads(pickle.dumps(llm)), PROMPTS[0]) == first
    script = """
import multiprocessing, sys
from refreekv_cpp import Llama
def work(llm, pipe):
    pipe.send(llm.create_completion(list(range(10, 200)), max_tokens=3, temperature=0.0)["usage"])
if __name__ == "__main__":
    llm = Llama(sys.argv[1], OPTIONS)
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=work, args=[llm, there])
    process.start()
    assert here.poll(60)
    usage = here.recv()
    process.join()
    assert usage == llm.create_completion(list(range(10, 200)), max_tokens=3, temperature=0.0)["usage"]
"""
    run(script.replace("OPTIONS", OPTIONS), tiny_model)
    llm.close()
    with pytest.raises(ClosedError):
        answer(llm, PROMPTS[0])


def test_what_cannot_be_pickled_says_so(tiny_model: Path) -> None:
    llm = load(tiny_model, ReFreeKV(), codes=True)
    with pytest.raises(TypeError, match="cannot pickle 'generator' object"):
        pickle.dumps(llm.generate(PROMPTS[0]))


def run(script: str, model: Path, code: int = 0) -> str:
    folder = model.parent / "script.py"  # a process that is spawned runs it again
    folder.write_text(script)
    done = subprocess.run([sys.executable, str(folder), str(model)], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr


@pytest.mark.parametrize("daemon", [True, False])
def test_the_interpreter_ends_in_the_middle_of_an_answer(tiny_model: Path, daemon: bool) -> None:
    script = f"""
import sys, threading
from refreekv_cpp import Llama
llm = Llama(sys.argv[1], {OPTIONS})
begun = threading.Event()
def work():
    for n in range({"10**9" if daemon else "3"}):
        for _ in llm.create_completion(list(range(10, 250)) * 3, max_tokens=50, temperature=0.0, stream=True):
            begun.set()
threading.Thread(target=work, daemon={daemon}).start()
begun.wait()
"""
    assert "Traceback" not in run(script, tiny_model)


@pytest.mark.parametrize("how", ["sys.exit(3)", "os._exit(3)", "del llm; sys.exit(3)", "llm.close(); sys.exit(3)"])
def test_the_interpreter_ends_with_a_stream_that_nobody_reads(tiny_model: Path, how: str) -> None:
    script = f"""
import os, sys
from refreekv_cpp import Llama
llm = Llama(sys.argv[1], {OPTIONS})
stream = llm.create_completion(list(range(10, 250)) * 3, max_tokens=50, temperature=0.0, stream=True)
next(stream)
{how}
"""
    assert run(script, tiny_model, 3) == ""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_forked_process_with_the_fork_method(tiny_model: Path) -> None:
    """multiprocessing's fork passes the object itself on: it says that it cannot be used there."""
    script = f"""
import multiprocessing, sys
from refreekv_cpp import ClosedError, Llama
llm = Llama(sys.argv[1], {OPTIONS})
llm.create_completion("abc", max_tokens=2)
def work(pipe):
    try:
        llm.create_completion("abc", max_tokens=2)
    except ClosedError as error:
        pipe.send(str(error))
here, there = multiprocessing.Pipe()
process = multiprocessing.get_context("fork").Process(target=work, args=[there])
process.start()
assert here.poll(60)
assert "before os.fork()" in here.recv()
process.join()
assert process.exitcode == 0
llm.create_completion("abc", max_tokens=2)
"""
    run(script, tiny_model)
