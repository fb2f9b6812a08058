"""Saving and loading, and llama-cpp-python's caches of states."""

from __future__ import annotations

import pickle
import subprocess
import sys
from contextlib import closing, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from support import feed
from tiny import random_tokens

from compatibility.check import POLICIES, PROMPT, Refused, Run, check, printable
from compatibility.sequences import assert_alike
from refreekv_cpp import CacheStateError, Full, Llama, native

MORE = random_tokens(9, seed=1)[1:]


def read(run: Run, **options: Any) -> Llama:
    llm = run.load(**options)
    llm.eval(PROMPT)
    llm.prune_kv()
    return llm


def assert_caches(run: Run, llm: Llama) -> None:
    """Prompts that come again are answered as without the cache."""
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 4, "logits_processor": printable()}
    for seed in (1, 2, 1):
        prompt = random_tokens(700, seed=seed)
        assert llm(prompt, **options)["choices"] == run.load()(prompt, **options)["choices"]


@check("LlamaRAMCache")
def ram_cache(run: Run) -> None:
    llm, cache = run.load(), llama_cpp.LlamaRAMCache()
    llm.set_cache(cache)
    assert_caches(run, llm)
    assert cache.cache_size > 0


@check("LlamaDiskCache")
def disk_cache(run: Run) -> None:
    cache = llama_cpp.LlamaDiskCache(str(run.folder / "cache"))
    with closing(cache.cache), redirect_stderr(StringIO()):  # it tells what it does
        llm = run.load()
        llm.set_cache(cache)
        assert_caches(run, llm)
        assert len(cache.cache) > 0


@check("save_state, load_state")
def states(run: Run) -> None:
    llm = read(run)
    state = llm.save_state()
    held = llm.kv_stats.cells_kept
    expected = feed(llm, MORE)

    other = run.load()
    other.eval(random_tokens(300, seed=5))
    for target in (llm, other):  # back to where it was, and into one that holds something else
        target.load_state(state)
        assert target.n_tokens == len(PROMPT)
        assert target.kv_stats.cells_kept == held
        np.testing.assert_array_equal(feed(target, MORE), expected)


@check("a state in a new process")
def new_process(run: Run) -> None:
    llm = read(run)
    state = run.folder / "state"
    state.write_bytes(pickle.dumps((llm, llm.save_state(), MORE)))
    program = (
        "import pickle, sys\n"
        "from compatibility.check import Run\n"
        "from support import feed\n"
        "llm, state, more = pickle.load(open(sys.argv[1], 'rb'))\n"
        "llm.load_state(state)\n"
        "sys.stdout.buffer.write(feed(llm, more).tobytes())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(state)], capture_output=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert result.stdout == feed(llm, MORE).tobytes()


@check("a state of a context with another policy")
def foreign_state(run: Run) -> None:
    other = next(policy for policy in POLICIES.values() if isinstance(policy, Full) == run.evicts)
    llm, source = read(run), run.load(policy=other)
    source.eval(PROMPT)
    source.prune_kv()
    state, expected = source.save_state(), feed(source, MORE)
    try:
        llm.load_state(state)
    except CacheStateError as refusal:
        assert llm.n_tokens == llm.kv_stats.n_tokens == 0
        assert run.by_hand(llm, PROMPT) == run.by_hand(run.load(), PROMPT)
        raise Refused(f"CacheStateError: {refusal}") from refusal
    assert np.abs(feed(llm, MORE) - expected).max() < 1e-2 * expected.std()


@check("state of one sequence (llama_state_seq_*)")
def sequence_states(run: Run) -> None:
    cold = {"cold": native.enum_value("COLD_MEMORY")}
    for unified in (True, False):
        saved, other = (run.sequences(kv_unified=unified, cold=cold) for _ in range(2))
        saved.read(0, PROMPT)
        run.prune(saved, 0)
        other.read(0, random_tokens(200, seed=1))
        other.read(1, random_tokens(200, seed=2))
        assert other.restore(saved.save(0), 1) > 0
        assert other.n_tokens(0) == 200
        assert other.n_tokens(1) == len(PROMPT)
        expected = saved.read(0, MORE)
        assert_alike(other.read(1, MORE), expected)
