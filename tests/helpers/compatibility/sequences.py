"""Several sequences in a context, through llama.cpp's C API; in one table of cells, and in one each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from tiny import random_tokens

from compatibility.check import PROMPT, Refused, Run, check
from refreekv_cpp import native

MORE = random_tokens(9, seed=1)[1:]
TABLES = {"unified": True, "a stream each": False}


def assert_alike(actual: Any, expected: Any) -> None:
    # how queries are rounded for codes depends on all sequences in a layer
    assert np.abs(actual - expected).max() < 1e-2 * expected.std()


def end_of_copying(run: Run) -> str:
    """What a process ends with that copies a part of a sequence to another stream."""
    program = (
        "import pathlib, sys\n"
        "from refreekv_cpp import Full\n"
        "from support import Sequences\n"
        "sequences = Sequences(pathlib.Path(sys.argv[1]), Full(), kv_unified=False)\n"
        "sequences.read(0, [1, 5, 6])\n"
        "sequences.copy(0, 1, 0, 2)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(run.model("gqa"))],
        capture_output=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    )
    assert result.returncode < 0
    return signal.Signals(-result.returncode).name


def register(table: str, unified: bool) -> None:
    @check(f"two sequences at once ({table})")
    def two_sequences(run: Run) -> None:
        both, alone = run.sequences(kv_unified=unified), [run.sequences(), run.sequences()]
        prompts = [PROMPT, random_tokens(800, seed=2)]
        for seq_id, prompt in enumerate(prompts):
            both.read(seq_id, prompt)
            alone[seq_id].read(0, prompt)
            run.prune(both, seq_id)
            run.prune(alone[seq_id], 0)
        together = both.read_together({0: MORE, 1: MORE})
        for seq_id in (0, 1):
            assert_alike(together[seq_id], alone[seq_id].read(0, MORE))

    @check(f"seq_cp of a whole sequence, seq_rm ({table})")
    def copied(run: Run) -> None:
        sequences, alone = run.sequences(kv_unified=unified), run.sequences()
        for each in (sequences, alone):
            each.read(0, PROMPT)
            run.prune(each, 0)
        sequences.copy(0, 1)
        assert sequences.remove(0)
        assert sequences.n_tokens(0) == 0
        assert_alike(sequences.read(1, MORE), alone.read(0, MORE))
        assert sequences.remove(1, len(PROMPT))  # what was read since
        assert sequences.n_tokens(1) == len(PROMPT)

    @check(f"seq_keep ({table})")
    def keep(run: Run) -> str:
        sequences, alone = run.sequences(kv_unified=unified), run.sequences()
        sequences.read(0, random_tokens(300, seed=4))
        for each, seq_id in ((sequences, 1), (alone, 0)):
            each.read(seq_id, PROMPT)
            run.prune(each, seq_id)
        llama_cpp.llama_memory_seq_keep(sequences.memory, 1)
        assert_alike(sequences.read(1, MORE), alone.read(0, MORE))
        return f"the other has {sequences.n_tokens(0)} tokens left"

    @check(f"seq_rm of the prompt's end ({table})")
    def remove_end(run: Run) -> None:
        sequences, alone = run.sequences(kv_unified=unified), run.sequences()
        for each in (sequences, alone):
            each.read(0, PROMPT)
            run.prune(each, 0)
        if sequences.remove(0, len(PROMPT) - 100):
            assert sequences.n_tokens(0) == len(PROMPT) - 100
            other = run.sequences()
            other.read(0, PROMPT[:-100])
            run.prune(other, 0)
            assert_alike(sequences.read(0, MORE), other.read(0, MORE))
            return
        why = native.last_error()
        assert_alike(sequences.read(0, MORE), alone.read(0, MORE))  # nothing was touched
        raise Refused(f"returns False: {why}")

    @check(f"seq_cp of a part ({table})")
    def copy_part(run: Run) -> None:
        if not run.evicts and not unified:
            raise Refused(f"llama.cpp ends the process: {end_of_copying(run)}")
        sequences = run.sequences(kv_unified=unified)
        sequences.read(0, PROMPT)
        run.prune(sequences, 0)
        sequences.copy(0, 1, 0, 300)
        if sequences.n_tokens(1) == 0:
            raise Refused(f"nothing is copied: {native.last_error()}")
        alone = run.sequences()
        alone.read(0, PROMPT[:300])
        assert_alike(sequences.read(1, MORE), alone.read(0, MORE))


for table, unified in TABLES.items():
    register(table, unified)


@check("seq_add (context shift)")
def shift(run: Run) -> None:
    sequences = run.sequences(cold={"cold": native.enum_value("COLD_MEMORY")})
    sequences.read(0, PROMPT)
    run.prune(sequences, 0)
    llama_cpp.llama_memory_seq_add(sequences.memory, 0, 0, -1, 5)
    if not llama_cpp.llama_memory_can_shift(sequences.memory):
        assert sequences.n_tokens(0) == len(PROMPT)
        raise Refused(f"llama_memory_can_shift is False: {native.last_error()}")
    assert sequences.n_tokens(0) == len(PROMPT) + 5
    there = run.sequences(cold={"cold": native.enum_value("COLD_MEMORY")})
    there.read(0, PROMPT)
    run.prune(there, 0)
    # attention looks at distances alone
    assert_alike(sequences.read(0, MORE), there.read(0, MORE))
