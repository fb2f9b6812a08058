"""A pruning that has no memory leaves the logits of the last batch where they were, whichever allocation fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import faults
import pytest

HELPERS = Path(__file__).parents[1] / "helpers"

# the first allocation of each place fails, and all that follow
SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import faults
import numpy as np
from llama_cpp import llama_get_logits_ith
from support import Sequences
from tiny import random_tokens
from refreekv_cpp import ReFreeKV, RefreeKVError, native
from refreekv_cpp._llama_cpp import library_dir

sequences = Sequences(Path(sys.argv[2]), ReFreeKV(), codes=True, cold={"theta": 0.003, "cold": 2})
sequences.read(0, random_tokens(700))

def logits():
    return np.ctypeslib.as_array(llama_get_logits_ith(sequences.ctx, -1), shape=(sequences.model.n_vocab(),)).copy()

expected = logits()

def prune(heal):
    error = ""
    try:
        native.prune(sequences.ctx, 0)
    except RefreeKVError as raised:
        error = str(raised)
    heal()
    return [error, bool(np.array_equal(logits(), expected))]

work = Path(sys.argv[3])
shim = faults.Shim([*library_dir().glob("libllama.so"), *library_dir().glob("libggml-cpu*.so")], work)
run = lambda n: faults.run(shim, faults.Fault(n, all_after=True), prune, work / "log")
first = run(0)
assert first.result, first.ended
(error, same), calls = first.result
assert not error and same
print(len(calls), "allocations")
n_errors = 0
for n in sorted({place: n for n, place in reversed(list(enumerate(calls, start=1)))}.values()):
    outcome = run(n)
    assert outcome.result, outcome.ended
    (error, same), _ = outcome.result
    n_errors += bool(error)
    assert same, f"{n}: other logits, after {error!r} in {outcome.where}"
assert n_errors or not calls  # none are known where the library has no symbols
"""


@pytest.mark.skipif(faults.compiler() is None, reason="it needs Linux and a C++ compiler")
def test_logits_stay_when_a_pruning_fails(tiny_model: Path, tmp_path: Path) -> None:
    shim = faults.compile_shim(tmp_path)
    environment = {**os.environ, "LD_PRELOAD": str(shim), "OPENBLAS_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1"}
    command = [sys.executable, "-c", SCRIPT, str(HELPERS), str(tiny_model), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
