"""A process that is forked can make a Llama of its own, whatever its parent did before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")

OPTIONS = 'kv_policy="refreekv", n_threads=2, n_threads_batch=2, verbose=False'


def run(script: str, model: Path) -> None:
    subprocess.run([sys.executable, "-c", script, str(model)], check=True, timeout=60)


def test_after_the_parent_has_generated(tiny_model: Path) -> None:
    # once it waited for ever for the parent's OpenMP threads, also where the parent's Llama was closed
    run(
        f"""
import os, sys
from refreekv_cpp import Llama
for n in range(2):
    llm = Llama(sys.argv[1], {OPTIONS})
    llm.create_completion("abc", max_tokens=2)
    if n == 1:
        llm.close()
        del llm
    if os.fork() == 0:
        Llama(sys.argv[1], {OPTIONS}).create_completion("abc", max_tokens=2)
        os._exit(0)
    assert os.wait()[1] == 0
Llama(sys.argv[1], {OPTIONS}).create_completion("abc", max_tokens=2)
""",
        tiny_model,
    )


def test_while_another_thread_loads(tiny_model: Path) -> None:
    # once the child's stdout was lost: llama-cpp-python sends it to nowhere while it loads
    run(
        f"""
import os, sys, threading, llama_cpp
from refreekv_cpp import Llama
begun, stdout, loads = threading.Event(), os.fstat(1), llama_cpp.llama_model_load_from_file
def load(*args):
    begun.set()
    threading.Event().wait(0.2)
    return loads(*args)
llama_cpp.llama_model_load_from_file = llama_cpp.llama_cpp.llama_model_load_from_file = load
thread = threading.Thread(target=lambda: Llama(sys.argv[1], {OPTIONS}))
thread.start()
begun.wait()
if os.fork() == 0:
    assert os.path.samestat(os.fstat(1), stdout)
    assert sys.stdout is sys.__stdout__
    Llama(sys.argv[1], {OPTIONS}).create_completion("abc", max_tokens=2)
    os._exit(0)
assert os.wait()[1] == 0
thread.join()
Llama(sys.argv[1], {OPTIONS}).create_completion("abc", max_tokens=2)
""",
        tiny_model,
    )


def test_two_threads_that_load_at_once_keep_stdout(tiny_model: Path) -> None:
    run(
        f"""
import os, sys, threading, time, llama_cpp
from refreekv_cpp import Llama
waits, stdout, loads = [0.3, 0.6], os.fstat(1), llama_cpp.llama_cpp.llama_model_load_from_file
def load(*args):
    time.sleep(waits.pop(0))
    return loads(*args)
llama_cpp.llama_model_load_from_file = llama_cpp.llama_cpp.llama_model_load_from_file = load
threads = [threading.Thread(target=lambda: Llama(sys.argv[1], {OPTIONS})) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert os.path.samestat(os.fstat(1), stdout)
assert sys.stdout is sys.__stdout__
""",
        tiny_model,
    )


def test_two_threads_that_silence_stdout_at_once_get_it_back(tiny_model: Path) -> None:
    # handlers of images with verbose=False silence it while they read; once it was lost
    run(
        """
import os, sys
import refreekv_cpp
from llama_cpp._utils import suppress_stdout_stderr
stdout = os.fstat(1)
for _ in range(2):
    one, other = suppress_stdout_stderr(disable=False), suppress_stdout_stderr(disable=False)
    one.__enter__()
    assert not os.path.samestat(os.fstat(1), stdout)
    other.__enter__()
    one.__exit__()
    assert not os.path.samestat(os.fstat(1), stdout)
    other.__exit__()
    assert os.path.samestat(os.fstat(1), stdout)
    assert sys.stdout is sys.__stdout__
""",
        tiny_model,
    )
